"""The checks of `.ci/device check`; that script finds the binary and the libraries and calls this one.

    python3 device.py FOLDER DEVICE [--small] [--libraries FOLDERS] [--preload LIBRARY]

Every part has a time limit, and one that fails does not stop the next. Needs the standard library of Python 3 only.
"""

import argparse
import array
import contextlib
import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

# Seconds of each part, below 600 together. `--small` needs less.
LIMITS = {"doctor": 20, "parity": 130, "bandit": 110, "rollout": 110, "learner": 110, "hot spots": 80}
# Parts whose failure fails the check.
DECISIVE = ("parity", "bandit")

# Tolerances of the test-suite: nats of a token and scores, probabilities of a bandit, the distance from the fixed point
# without mixture.
NATS, PROBABILITY, DISTANCE = 1e-3, 0.02, 0.1

TRANSFORMERS = ("random-llama3", "random-mistral", "random-qwen2", "random-qwen3")
NUMPY = ("stories260K", "babyllama-tok361")
REWARD = ("random-llama-reward", "random-qwen2-reward", "random-deberta-reward")

# The equilibrium of configs/bandit.toml, as in tests/tests/bandit.rs.
EQUILIBRIUM = [0.540314, 0.256488, 0.203198]

# The shape of SmolLM2-135M.
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152}
# A block with fewer operations, for --small and for profilers.
FEW_LAYERS = 4
SMALL = {"num_hidden_layers": 2, "vocab_size": 4096}


class Failed(Exception):
    """A check that did not succeed, in words, with the end of the output of what failed."""

    def __init__(self, reason, output=""):
        super().__init__(reason)
        self.output = output[-4000:]


class Agon:
    """Runs the binary on the device within the time of the current part."""

    def __init__(self, folder, device, libraries, preload):
        self.binary, self.device, self.deadline = folder / "agon", device, 0.0
        self.environment = dict(os.environ)
        if libraries:
            self.environment["LD_LIBRARY_PATH"] = libraries
        if preload:
            self.environment["LD_PRELOAD"] = preload

    def run(self, *arguments, profiler=(), input=None):
        """The standard output of `agon ARGUMENTS`, or of a profiler of it, whatever its exit status."""
        command = [*map(str, profiler), str(self.binary), *map(str, arguments)]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failed("the time of this part was over before it began")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A group of its own: a profiler and the binary are stopped together.
        process = subprocess.Popen(command, env=self.environment, text=True, start_new_session=True, **pipes)
        try:
            output, errors = process.communicate(input, timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            raise Failed(f"stopped after {left:.0f} s", output + errors) from None
        if process.returncode != 0 and not profiler:
            lines = (errors or output).strip().splitlines()
            raise Failed(f"exit status {process.returncode}: " + " | ".join(lines[-2:]), output + errors)
        return output

    def json_lines(self, *arguments, **options):
        return [json.loads(line) for line in self.run(*arguments, **options).splitlines() if line.startswith("{")]

    def score(self, model, sequences, *more):
        rows = "".join(json.dumps({"ids": ids}) + "\n" for ids in sequences)
        return self.json_lines("score", "--model", model, "--device", self.device, *more, input=rows)

    def generate(self, model, device, prompts, count, *more):
        """Greedy continuations of texts."""
        options = [option for text in prompts for option in ("--prompt", text)]
        return self.json_lines("generate", "--model", model, "--device", device, "--num", 1, "--top-k", 1,
                               "--max-new-tokens", count, "--json", *options, *more)


class Results:
    """The outcome of every check, for the table and for device.json."""

    def __init__(self, agon):
        self.agon, self.rows = agon, []

    def begin(self, name):
        """Starts the clock of a part."""
        print(f"\n== {name} (at most {LIMITS[name]} s)", flush=True)
        self.name, self.agon.deadline = name, time.monotonic() + LIMITS[name]

    def check(self, name, work):
        """Runs one check, which returns a text and its measurements, and records the outcome."""
        started = time.monotonic()
        row = {"part": self.name, "name": name, "ok": True}
        try:
            row["text"], row["measured"] = work()
        except Failed as failed:
            row.update(ok=False, text=str(failed), output=failed.output)
        except (OSError, LookupError, TypeError, ValueError, subprocess.SubprocessError) as error:
            row.update(ok=False, text=f"{type(error).__name__}: {error}")
        row["seconds"] = round(time.monotonic() - started, 1)
        self.rows.append(row)
        print(line(row), flush=True)

    def failed(self):
        return [row for row in self.rows if row["part"] in DECISIVE and not row["ok"]]


def line(row):
    return f"{'ok' if row['ok'] else 'FAIL':4} {row['part']:9} {row['name']:24} {row['seconds']:6.1f} s  {row['text']}"


def reference(folder):
    return json.loads((folder / "reference.json").read_text())


def unpadded(data):
    return [ids[: sum(mask)] for ids, mask in zip(data["ids"], data["attention_mask"])]


def largest_difference(found, expected):
    if len(found) != len(expected):
        raise Failed(f"{len(found)} values, expected {len(expected)}")
    return max(abs(a - b) for a, b in zip(found, expected))


def within(difference, tolerance, what):
    if not difference < tolerance:
        raise Failed(f"{what} differ by {difference:.2e}; the tolerance is {tolerance}")
    return f"{what} within {difference:.1e}", {"difference": difference, "tolerance": tolerance}


def doctor(agon):
    text = agon.run("doctor")
    print(text, end="")
    kind = agon.device.split(":")[0]
    if not any(row.startswith(f"ok   device {kind} ") and " usable" in row and "not usable" not in row for row in text.splitlines()):
        raise Failed(f"agon doctor does not call {kind} usable")
    return f"{kind} is usable", {"doctor": text}


def scored_parity(agon, model, data, *more):
    """Log-probabilities of a training pass against those of transformers or PEFT."""
    sequences = unpadded(data)
    found = agon.score(model, sequences, *more)
    expected = [row[: len(ids) - 1] for row, ids in zip(data["logprobs"], sequences)]
    return within(max(largest_difference(f["logprobs"], e) for f, e in zip(found, expected, strict=True)), NATS,
                  "log-probabilities")


def numpy_parity(agon, model):
    """The sum of log-probabilities, and greedy decoding, against a computation in f64."""
    data = reference(model)
    scored, prompts = data["scored"], data["prompts"]
    found = agon.score(model, [scored["ids"]])[0]["logprobs"]
    per_token = abs(sum(found) - scored["sum_logprob"]) / len(scored["ids"])
    for prompt in prompts:
        expected = prompt["greedy_ids"][len(prompt["ids"]) :]
        (decoded,) = agon.generate(model, agon.device, [prompt["text"]], len(expected))
        length = len(decoded["ids"]) if decoded["finish"] == "eos" else len(expected)
        if decoded["ids"][:length] != expected[:length]:
            raise Failed(f"greedy decoding of {prompt['text']!r} gives {decoded['ids']}, expected {expected}")
    return within(per_token, NATS, "log-probabilities")


def decoded_parity(agon, model, *more):
    """Greedy decoding on the device against the CPU's kernels."""
    prompts = ["Once upon a time", "Tom and his dog"]
    there, here = (agon.generate(model, device, prompts, 24, *more) for device in (agon.device, "cpu"))
    if [row["ids"] for row in there] != [row["ids"] for row in here]:
        raise Failed("greedy decoding gives other tokens than on the CPU")
    return within(max(largest_difference(a["logprobs"], b["logprobs"]) for a, b in zip(there, here)), NATS,
                  "decoded log-probabilities")


def reward_parity(agon, model):
    data = reference(model)
    found = [row["score"] for row in agon.score(model, unpadded(data), "--reward")]
    return within(largest_difference(found, data["scores"]), NATS, "scores")


def check_parity(agon, results, folder):
    models = folder / "models"
    base, adapter = models / "random-llama3", models / "random-llama3-lora"
    adapted = ("--adapter", adapter)
    for name in TRANSFORMERS:
        results.check(name, lambda: scored_parity(agon, models / name, reference(models / name)))
    results.check(adapter.name, lambda: scored_parity(agon, base, reference(adapter), *adapted))
    for name in NUMPY:
        results.check(name, lambda: numpy_parity(agon, models / name))
    for name in REWARD:
        results.check(name, lambda: reward_parity(agon, models / name))
    for name in TRANSFORMERS:
        results.check(f"{name}, decoded", lambda: decoded_parity(agon, models / name))
    results.check("mixture, decoded", lambda: decoded_parity(agon, base, *adapted, "--mixture-coef", 0.5))


def bandit(agon, folder, runs, game):
    """A run of configs/bandit.toml, whose policy must be the fixed point of its game."""
    run = runs / f"bandit-{'mixture' if game else 'plain'}"
    sets = [f"model.device={agon.device}", "learner.steps=350", "telemetry.listen=127.0.0.1:0"]
    if game:
        sets += [f"model.reference_probabilities={game['ref']}", f"preference.judge.matrix={game['P']}",
                 f"actor.mixture_coef={game['mixture_coef']}", f"learner.objective.tau={game['tau']}"]
    options = [option for setting in sets for option in ("--set", setting)]
    agon.run("train", folder / "bandit.toml", "--run-dir", run, *options)
    report = json.loads((run / "report.json").read_text())
    expected = game["policy"] if game else EQUILIBRIUM
    text, measured = within(largest_difference(report["policy"], expected), PROBABILITY, "probabilities")
    if game and largest_difference(report["policy"], game["without_mixture"]) <= DISTANCE:
        raise Failed("the policy is the fixed point without mixture")
    return text, measured | {"policy": report["policy"], "expected": expected}


class DeviceMemory:
    """The most memory in use on the GPU while a command runs, in MiB, as nvidia-smi tells it twice a second."""

    def __init__(self, device):
        self.index = device.partition(":")[2] or "0"
        self.is_known = device.startswith("cuda") and shutil.which("nvidia-smi") is not None
        self.peak, self.done = None, threading.Event()

    def __enter__(self):
        if self.is_known:
            self.thread = threading.Thread(target=self.poll, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()

    def poll(self):
        query = ["nvidia-smi", f"--id={self.index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(0.5):
            with contextlib.suppress(ValueError, OSError, subprocess.SubprocessError):
                used = int(subprocess.run(query, capture_output=True, text=True, timeout=5).stdout)
                self.peak = max(self.peak or 0, used)


def write_model(folder, tokenizer, changes):
    """A model of SHAPE with `changes`, with random weights in bf16 and the tokenizer of another model."""
    shape = SHAPE | changes
    config = shape | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                      "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
                      "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 1}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder)
    hidden, inner, width = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    block = {"input_layernorm": [hidden], "self_attn.q_proj": [queries, hidden], "self_attn.k_proj": [keys, hidden],
             "self_attn.v_proj": [keys, hidden], "self_attn.o_proj": [hidden, queries],
             "post_attention_layernorm": [hidden], "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
             "mlp.down_proj": [hidden, inner]}
    tensors = {"model.embed_tokens.weight": [shape["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(shape["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}.weight": dims for name, dims in block.items()}
    write_safetensors(folder / "model.safetensors", tensors)


def write_safetensors(path, tensors):
    """Weights of standard deviation .02, and norms of ones. A stretch of random values repeats."""
    header, end = {}, 0
    for name, dims in tensors.items():
        start, end = end, end + 2 * (dims[0] if len(dims) == 1 else dims[0] * dims[1])
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    # The upper two bytes of an f32 are a bf16. The length has no divisor in common with any row's.
    source = random.Random(0)
    floats = array.array("f", (source.gauss(0.0, 0.02) for _ in range(262_139))).tobytes()
    values = bytearray(len(floats) // 2)
    values[0::2], values[1::2] = floats[2::4], floats[3::4]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            start, end = entry["data_offsets"]
            size = end - start
            if len(entry["shape"]) == 1:
                file.write(b"\x80\x3f" * (size // 2))
                continue
            whole, rest = divmod(size, len(values))
            for _ in range(whole):
                file.write(values)
            file.write(values[:rest])


def bench(agon, part, model, sizes, *more):
    """One benchmark: throughput, share of the roofline, memory and, for the learner, the seconds of its phases."""
    dtype, batch, prompt, new_tokens, seconds = sizes
    with DeviceMemory(agon.device) as memory:
        (report,) = agon.json_lines("bench", part, "--model", model, "--device", agon.device, "--dtype", dtype, "--batch", batch,
                                    "--prompt", prompt, "--new-tokens", new_tokens, "--seconds", seconds, "--json", *more)
    report["device_peak_mib"] = memory.peak
    text = f"{report['tokens_per_second']:10.0f} tokens/s, {100 * report['roofline_share']:6.2f} % of the roofline"
    text += f" ({report['machine_gflops'] / 1000:.3g} TFLOP/s)"
    text += f", {memory.peak} MiB" if memory.peak else ""
    for phase, spent in report.get("seconds", {}).items():
        text += f", {phase} {1000 * (spent or 0):.0f} ms"
    return text, report


def check_rollouts(agon, results, model, small):
    # dtype, batch, weight of the reference in the mixture
    cases = [("bf16", 16, 0), ("bf16", 64, 0), ("bf16", 256, 0), ("bf16", 64, 0.125), ("f32", 64, 0)]
    if small:
        cases = [("f32", 8, 0.125), ("bf16", 2, 0)]
    prompt, new_tokens, seconds = (8, 8, 0.1) if small else (64, 64, 2)
    for dtype, batch, mixture in cases:
        name = f"{dtype}, {batch}" + (", mixture" if mixture else "")
        sizes = (dtype, batch, prompt, new_tokens, seconds)
        results.check(name, lambda: bench(agon, "rollout", model, sizes, "--mixture-coef", mixture))


def check_steps(agon, results, model, small):
    cases = [("f32", 4), ("bf16", 2)] if small else [("bf16", 16), ("bf16", 64), ("bf16", 256), ("f32", 64)]
    prompt, new_tokens, seconds = (8, 8, 0.1) if small else (64, 128, 2)
    for dtype, batch in cases:
        results.check(f"{dtype}, {batch}", lambda: bench(agon, "learner", model, (dtype, batch, prompt, new_tokens, seconds)))


def by_kernel(lines, name, nanoseconds):
    """The ten kernels that take the most time, from the lines of a CSV: (name, milliseconds, share)."""
    totals = {}
    for row in csv.DictReader(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            totals[row[name]] = totals.get(row[name], 0.0) + float(row[nanoseconds].replace(",", ""))
    if not totals:
        raise Failed("the profiler named no kernel", "\n".join(lines))
    every = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])[:10]
    return [(kernel[:70], spent / 1e6, spent / every) for kernel, spent in ranked]


def with_nsys(agon, runs, step):
    """All kernels of the process; those that measure the roofline, half a second of products, are among them."""
    report = runs / "profile"
    agon.run(*step, profiler=["nsys", "profile", "--trace", "cuda", "--force-overwrite", "true", "--output", report])
    command = ["nsys", "stats", "--quiet", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{report}.nsys-rep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, agon.deadline - time.monotonic()))
    table = [text for text in done.stdout.splitlines() if "," in text]
    return by_kernel(table, "Name", "Total Time (ns)")


def with_ncu(agon, runs, step):
    """The first kernels of the process."""
    # The settings of the accelerator stay as they are; a quoted line is a row of the table.
    options = ["--clock-control", "none", "--metrics", "gpu__time_duration.sum", "--print-units", "base", "--csv",
               "--launch-count", 2000, "--kill", "yes"]
    output = agon.run(*step, profiler=["ncu", *options])
    table = [text for text in output.splitlines() if text.startswith('"')]
    if not table:
        raise Failed("ncu measured no kernel", output)
    return by_kernel(table, "Kernel Name", "Metric Value")


def check_hot_spots(agon, results, runs, model):
    """The kernels of training steps, by the first profiler that works; a model of few layers keeps them few."""
    step = ["bench", "learner", "--model", model, "--device", agon.device, "--dtype", "bf16", "--batch", 16, "--prompt", 64,
            "--new-tokens", 128, "--seconds", 0, "--json"]
    there = [(name, work) for name, work in (("ncu", with_ncu), ("nsys", with_nsys)) if shutil.which(name)]
    if not agon.device.startswith("cuda") or not there:
        print("no ncu and no nsys for this device: only the phases of the learner are known")
        return
    # Half of the time for each, so that one that hangs leaves time for the other.
    last = agon.deadline
    for index, (name, work) in enumerate(there):
        left = last - time.monotonic()
        agon.deadline = time.monotonic() + left / (len(there) - index)

        def profile():
            kernels = work(agon, runs, step)
            for kernel, milliseconds, share in kernels:
                print(f"     {100 * share:5.1f} %  {milliseconds:9.2f} ms  {kernel}")
            return f"{kernels[0][0]} takes {100 * kernels[0][2]:.0f} %", kernels

        results.check(name, profile)
        if results.rows[-1]["ok"]:
            return


def describe(device):
    """The GPU and its driver, as nvidia-smi names them."""
    if not device.startswith("cuda") or not shutil.which("nvidia-smi"):
        return device
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return device


def save(folder, results, machine, started):
    record = {"device": results.agon.device, "machine": machine, "seconds": round(time.monotonic() - started, 1),
              "failed": len(results.failed()), "checks": results.rows}
    text = json.dumps(record, indent=1) + "\n"
    for place in {folder, pathlib.Path(os.environ.get("OUT") or folder)}:
        (place / "device.json").write_text(text)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("device")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--libraries", default="")
    parser.add_argument("--preload", default="")
    options = parser.parse_args()
    started, folder = time.monotonic(), options.folder.resolve()
    agon = Agon(folder, options.device, options.libraries, options.preload)
    results, machine = Results(agon), describe(options.device)
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        runs = pathlib.Path(temporary)
        model, few, tokenizer = runs / "model", runs / "few-layers", folder / "models" / "stories260K"
        write_model(model, tokenizer, SMALL if options.small else {})
        write_model(few, tokenizer, {"num_hidden_layers": FEW_LAYERS})
        game = json.loads((folder / "mixture_matters.json").read_text())[0]
        parts = {
            "doctor": lambda: results.check("agon doctor", lambda: doctor(agon)),
            "parity": lambda: check_parity(agon, results, folder),
            "bandit": lambda: [
                results.check("online IPO", lambda: bandit(agon, folder, runs, None)),
                results.check("IPO-MD", lambda: bandit(agon, folder, runs, game)),
            ],
            "rollout": lambda: check_rollouts(agon, results, model, options.small),
            "learner": lambda: check_steps(agon, results, model, options.small),
            "hot spots": lambda: check_hot_spots(agon, results, runs, few),
        }
        for name, work in parts.items():
            results.begin(name)
            work()
            save(folder, results, machine, started)
    print(f"\n== {machine}, {time.monotonic() - started:.0f} s")
    print("\n".join(line(row) for row in results.rows))
    failed = results.failed()
    print(f"{len(failed)} failed of those that decide; {folder / 'device.json'} has every number")
    sys.exit(1 if failed else 0)


main()
