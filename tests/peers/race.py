"""Wall-clock time to a gold win rate of .75 over the base on the playground: Agon against TRL's online IPO.

usage: race.py --agon PROGRAM --output FOLDER [--seeds 1 2 3 4 5] [--steps 150]

Both start from the same base policy, see the same posts, and are judged by the same gold preference: TRL asks
`agon preference` over HTTP. Both train with batches of 64 posts, AdamW, and the learning rate of configs/quickstart.toml.
The policy is evaluated every 10 steps by the gold preference on 512 held-out posts: Agon's evaluations are part of its
time, TRL's checkpoints are saved and evaluated outside its time, which ends at the goal. Prints a line of JSON a seed, and the ratio of the times.
"""

import argparse
import json
import os
import pathlib
import subprocess
import time
import urllib.request

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", WANDB_DISABLED="true")

GOAL, EVERY, BATCH, NEW_TOKENS, HELD_OUT = 0.75, 10, 64, 28, 512
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/quickstart.toml")


def settings(seed, steps):
    values = {
        "run.seed": seed, "learner.steps": steps, "actor.mixture_coef": 0, "evaluation.eval_steps": EVERY,
        "evaluation.prompts": HELD_OUT, "telemetry.samples_per_step": BATCH, "learner.save_steps": 0,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def agon(arguments, options):
    call = [options.agon, *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True, cwd=options.output).stdout


def run_agon(seed, options):
    run = options.output / f"agon-{seed}"
    agon(["train", CONFIG, "--run-dir", str(run), *settings(seed, options.steps)], options)
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    reached = [row for row in rows if row.get("eval/gold_win_rate", 0) >= GOAL]
    posts = [json.loads(line)["prompt"] for line in open(run / "samples.jsonl")]
    first = reached[0] if reached else {}
    return first.get("step"), first.get("wall_seconds"), posts


class Judge:
    """The gold preference of `agon preference`, as a reward function of TRL: p for the first half, 1 - p for the second."""

    __name__ = "gold"

    def __init__(self, seed, options):
        call = [options.agon, "preference", CONFIG, "--set", "preference.http.listen=127.0.0.1:0", *settings(seed, 1)]
        self.process = subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=options.output
        )
        self.url = self.process.stdout.readline().strip() + "/v1/preferences"

    def close(self):
        self.process.terminate()
        self.process.wait()

    def __call__(self, prompts, completions, **_):
        half = len(completions) // 2
        scores = []
        for start in range(0, half, 64):
            rows = range(start, min(start + 64, half))
            scores += self.ask([(prompts[i], completions[i], completions[i + half]) for i in rows])
        return scores + [1.0 - p for p in scores]

    def ask(self, rows):
        def side(name, text):
            # The tokens are words: an answer of the greatest length has not ended.
            finish = "length" if len(text.split()) >= NEW_TOKENS else "stop"
            return {name: text or " ", f"{name}_finish": finish}

        # The judge adds the tokens around a post itself.
        post = lambda prompt: prompt.removeprefix("<bos> ").removesuffix(" <sep>")
        pairs = [{"prompt": post(prompt), **side("first", a), **side("second", b)} for prompt, a, b in rows]
        request = urllib.request.Request(
            self.url, json.dumps({"pairs": pairs}).encode(), {"Content-Type": "application/json"}
        )
        results = json.load(urllib.request.urlopen(request))["results"]
        # A judge that abstains would make a race of nothing.
        return [result["p"] for result in results]


def win_rate(policy, base, seed, options):
    call = ["eval", str(policy), base, "--config", CONFIG, "--prompts", str(HELD_OUT), "--json"]
    return json.loads(agon([*call, *settings(seed, 1)], options))["win_rate"]


def run_trl(seed, base, posts, options):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count())
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    folder = options.output / f"trl-{seed}"
    seconds, win_rates = {}, {}

    class Timer(TrainerCallback):
        """Time of training alone, without saving and evaluation; ends training at the goal."""

        def on_train_begin(self, *_, **__):
            self.spent, self.started = 0.0, time.perf_counter()

        def on_step_end(self, arguments, state, control, model=None, **_):
            step = state.global_step
            if step % EVERY:
                return
            self.spent += time.perf_counter() - self.started
            model.save_pretrained(folder / str(step))
            tokenizer.save_pretrained(folder / str(step))
            seconds[step] = self.spent
            win_rates[step] = win_rate(folder / str(step), base, seed, options)
            control.should_training_stop = win_rates[step] >= GOAL
            self.started = time.perf_counter()

    judge = Judge(seed, options)
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts = [{"prompt": f"<bos> {post} <sep>"} for post in posts[: BATCH * options.steps]]
    trainer = OnlineDPOTrainer(
        model=load(), ref_model=load(), reward_funcs=judge, processing_class=tokenizer,
        train_dataset=Dataset.from_list(prompts), callbacks=[Timer()],
        args=OnlineDPOConfig(
            loss_type="ipo", beta=0.05, output_dir=str(folder), per_device_train_batch_size=BATCH,
            max_steps=options.steps, max_new_tokens=NEW_TOKENS, max_length=128, temperature=1.0, learning_rate=7e-4,
            lr_scheduler_type="linear", adam_beta2=0.99, report_to=[], save_strategy="no", logging_steps=EVERY,
            use_cpu=True, bf16=False, disable_dropout=True, missing_eos_penalty=None, gradient_checkpointing=False,
            seed=seed,
        ),
    )
    try:
        trainer.train()
    finally:
        judge.close()
    last = max(seconds)
    return last if win_rates[last] >= GOAL else None, seconds[last]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agon", required=True)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    options.agon = os.path.abspath(options.agon)
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    ratios = []
    for seed in options.seeds:
        base = agon(["sft", CONFIG, *settings(seed, 1)], options).strip()
        base = str((options.output / base).resolve())
        step, seconds, posts = run_agon(seed, options)
        trl_step, trl_seconds = run_trl(seed, base, posts, options)
        row = {
            "seed": seed, "agon_step": step, "agon_seconds": seconds, "trl_step": trl_step, "trl_seconds": trl_seconds,
        }
        if step and trl_seconds:
            ratios.append(trl_seconds / seconds)
            row["ratio"] = ratios[-1]
            row["trl_reached"] = trl_step is not None
        print(json.dumps(row), flush=True)
    ratios.sort()
    print(json.dumps({"seeds": len(ratios), "median_ratio": ratios[len(ratios) // 2] if ratios else None}))


main()
