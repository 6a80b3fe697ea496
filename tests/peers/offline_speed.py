"""Offline DPO here and with TRL's DPOTrainer: pairs a second and peak memory of a step, each side in a process of its own.

    python tests/peers/offline_speed.py --agon target/release/agon --model FOLDER

TRL computes the reference's log-probabilities before training, as agon does, so that neither is timed; both keep them.
Prints a line of JSON for f32 and one for bf16, with the ratios. The machine should be otherwise idle.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true")

WORDS = "once upon a time there was little girl named she loved to play outside in the park one day saw big red ball".split()
BATCH, PROMPT, RESPONSE = 16, 32, 64


def write_pairs(path, steps):
    rng = random.Random(0)
    words = lambda count: " ".join(rng.choice(WORDS) for _ in range(count))
    rows = [
        {"prompt": words(PROMPT), "chosen": " " + words(RESPONSE), "rejected": " " + words(RESPONSE)}
        for _ in range(BATCH * steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trl(arguments):
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(os.cpu_count())
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in open(arguments.pairs)]
    durations = []

    class Timed(DPOTrainer):
        def training_step(self, *args, **kwargs):
            started = time.perf_counter()
            result = super().training_step(*args, **kwargs)
            durations.append(time.perf_counter() - started)
            return result

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            args=DPOConfig(
                output_dir=folder, beta=0.1, per_device_train_batch_size=BATCH, max_steps=arguments.steps,
                precompute_ref_log_probs=True, learning_rate=1e-5, max_length=None, gradient_checkpointing=False,
                bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
            ),
        )
        started = time.perf_counter()
        trainer.train()
        # Steps include the optimiser's, which training_step does not.
        whole = (time.perf_counter() - started) / arguments.steps
    report = {
        "pairs_per_second": BATCH / max(statistics.median(durations[1:]), 1e-9),
        "pairs_per_second_of_loop": BATCH / whole,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(report))


def agon(arguments, dtype, pairs, folder):
    run = pathlib.Path(folder) / f"agon-{dtype}"
    settings = [
        f'model.path="{arguments.model}"', f'pairs.path="{pairs}"', "evaluation.prompts=0",
        "learner.objective.kind=dpo", f"learner.steps={arguments.steps}", f"learner.train_batch_size={BATCH}",
        "learner.learning_rate=1e-5", "learner.save_steps=0", f"learner.precision={dtype}",
    ]
    command = [arguments.agon, "train", "configs/default.toml", "--run-dir", str(run)]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    report = json.loads((run / "report.json").read_text())
    return {
        "pairs_per_second": BATCH / statistics.median(seconds[1:]),
        "peak_gib": report["peak_memory_bytes"] / 2**30,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agon", help="the program")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="run TRL's side alone, on --pairs")
    parser.add_argument("--pairs")
    arguments = parser.parse_args()
    arguments.model = str(pathlib.Path(arguments.model).resolve())
    if arguments.dtype:
        return trl(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pairs = pathlib.Path(folder) / "pairs.jsonl"
        write_pairs(pairs, arguments.steps)
        for dtype in ("f32", "bf16"):
            call = [sys.executable, __file__, "--model", arguments.model, "--steps", str(arguments.steps)]
            call += ["--dtype", dtype, "--pairs", str(pairs)]
            peer = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            own = agon(arguments, dtype, pairs, folder)
            speed = own["pairs_per_second"] / peer["pairs_per_second"]
            memory = own["peak_gib"] / peer["peak_gib"]
            print(json.dumps({"dtype": dtype, "agon": own, "trl": peer, "speed_ratio": speed, "memory_ratio": memory}))


if __name__ == "__main__":
    main()
