"""Offline training here and with TRL's DPOTrainer: the same file of pairs, model, order and optimiser.

    python tests/peers/offline.py --agon target/release/agon --model ../shared/data/models/stories260K

Prints, for each loss, the largest difference of the step losses as a line of JSON, and fails above the tolerance. TRL's
IPO divides log-probabilities by the number of tokens (learner.logp_reduction = "mean"); its sigmoid loss is DPO, and with
its sft loss RPO with nll = "mean", in batches of one pair, since TRL takes the mean over the tokens of a batch.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true")

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

WORDS = (
    "once upon a time there was little girl named lily she loved to play outside in the park one day saw big red ball "
    "dog cat happy sad friend said hello mom dad went home found new toy very fun and they ran sun sky tree bird sang"
).split()

RATE = 1e-4
BETA = 0.1
NLL = 0.2
# Of each objective: TRL's losses and their weights, our temperature and reduction, and the pairs of a batch.
LOSSES = {
    "dpo": (["sigmoid"], None, "beta", "sum", 8),
    "ipo": (["ipo"], None, "tau", "mean", 8),
    "rpo": (["sigmoid", "sft"], [1.0, NLL], "beta", "sum", 1),
}


def text(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_pairs(path, count):
    rng = random.Random(0)
    rows = [
        {"prompt": text(rng, 3, 12), "chosen": " " + text(rng, 2, 20), "rejected": " " + text(rng, 2, 20)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


class Recorder(DPOTrainer):
    """Takes the pairs in the order of the file and records every loss."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss = result[0] if return_outputs else result
        self.losses.append(float(loss.detach()))
        return result


def theirs(model, rows, loss, steps, folder):
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kinds, weights, _, _, batch = LOSSES[loss]
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=kinds,
        loss_weights=weights,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1e9,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Recorder(
        model=policy,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.losses = []
    trainer.train()
    return trainer.losses


def ours(agon, model, path, loss, steps, folder):
    run = folder / f"agon-{loss}"
    _, _, temperature, reduction, batch = LOSSES[loss]
    settings = [
        f'model.path="{model}"',
        f'pairs.path="{path}"',
        "pairs.shuffle=false",
        "evaluation.prompts=0",
        f"learner.objective.kind={loss}",
        f"learner.objective.{temperature}={BETA}",
        f"learner.logp_reduction={reduction}",
        f"learner.steps={steps}",
        f"learner.train_batch_size={batch}",
        f"learner.learning_rate={RATE}",
        "learner.warmup_ratio=0",
        "learner.max_grad_norm=1e9",
        "learner.save_steps=0",
    ]
    if loss == "rpo":
        settings += ["learner.objective.nll=mean", f"learner.objective.nll_coef={NLL}"]
    command = [agon, "train", "configs/default.toml", "--run-dir", str(run)]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agon", required=True, help="the program")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a loss, relative to values above 1")
    arguments = parser.parse_args()
    model = str(pathlib.Path(arguments.model).resolve())
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        path = folder / "pairs.jsonl"
        rows = write_pairs(path, 8 * arguments.steps)
        for loss in LOSSES:
            peer = theirs(model, rows, loss, arguments.steps, folder / "trl")
            own = ours(arguments.agon, model, path, loss, arguments.steps, folder)
            if len(peer) != arguments.steps or len(own) != arguments.steps:
                sys.exit(f"{loss}: {len(peer)} losses of TRL and {len(own)} of agon instead of {arguments.steps}")
            gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(own, peer)]
            worst = max(worst, *gaps)
            summary = {"loss": loss, "largest_difference": max(gaps), "first": [own[0], peer[0]], "last": [own[-1], peer[-1]]}
            print(json.dumps(summary))
    if worst > arguments.tolerance:
        sys.exit(f"the losses differ by {worst:.3g}, more than {arguments.tolerance:g}")


if __name__ == "__main__":
    main()
