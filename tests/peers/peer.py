"""The workloads of `agon bench` in transformers, PyTorch and TRL.

Prints one line of JSON. Token ids are random and there is no end-of-text token, so that both sides do the same work.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", WANDB_DISABLED="true")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def load(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model


def median_seconds(work, repetitions):
    work()
    durations = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def make_model(arguments):
    """A Llama of 15 million parameters with random weights and the tokenizer of another folder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    config = LlamaConfig(
        vocab_size=32064, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=32000, pad_token_id=32000,
    )
    LlamaForCausalLM(config).save_pretrained(arguments.model)
    tokenizer.save_pretrained(arguments.model)
    return {"peer": "none", "made": arguments.model}


def rollout(arguments):
    """transformers' generate with plain sampling; with a mixture coefficient, the sampler of TRL's Nash-MD."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model = load(arguments.model, dtype).eval()
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.prompt))
    if arguments.mixture_coef > 0:
        from trl.experimental.nash_md.nash_md_trainer import GeometricMixtureWrapper

        reference = load(arguments.model, dtype).eval()
        model = GeometricMixtureWrapper(
            model, reference, model.generation_config, arguments.mixture_coef, model.device
        )

    def generate():
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0,
                max_new_tokens=arguments.new_tokens, min_new_tokens=arguments.new_tokens,
            )

    seconds = median_seconds(generate, 3)
    peer = "TRL" if arguments.mixture_coef > 0 else "transformers"
    return {"peer": peer, "tokens_per_second": arguments.batch * arguments.new_tokens / seconds}


def learner(arguments):
    """One IPO step of PyTorch on completions of 128 tokens, all scored, clipped, AdamW; bf16: the usual mixed precision."""
    model = load(arguments.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, 129))
    reference = torch.full((arguments.batch,), -1280.0)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            logits = model(ids[:, :-1]).logits
        logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2).sum(1)
        ratios = logps - reference
        loss = ((ratios[0::2] - ratios[1::2] - 1 / (2 * 0.1)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"peer": "PyTorch", "tokens_per_second": arguments.batch * 128 / median_seconds(step, 3)}


def train(arguments):
    """TRL's online IPO, or its Nash-MD with a mixture coefficient."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    policy, reference = load(arguments.model, dtype), load(arguments.model, dtype)
    prompt = "Once upon a time there was a little girl who liked to"
    rows = Dataset.from_list([{"prompt": f"{prompt} {i}"} for i in range(256)])
    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=arguments.batch, max_steps=5,
        max_new_tokens=arguments.new_tokens, max_length=256, learning_rate=1e-5, beta=0.1, temperature=1.0,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, disable_dropout=True,
        missing_eos_penalty=None, gradient_checkpointing=False,
    )
    shared = dict(model=policy, ref_model=reference, processing_class=tokenizer, train_dataset=rows)
    if arguments.lora > 0:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=arguments.lora, lora_alpha=arguments.lora, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        shared.update(ref_model=None, peft_config=adapter)
    if arguments.mixture_coef == 0:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        def judge(completions, **_):
            return [float(len(completion)) for completion in completions]

        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(loss_type="ipo", **common), reward_funcs=judge, **shared)
    else:
        from transformers import LlamaForSequenceClassification
        from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

        config = policy.config.__class__(**{**policy.config.to_dict(), "num_labels": 1})
        trainer = NashMDTrainer(
            args=NashMDConfig(mixture_coef=arguments.mixture_coef, **common),
            reward_funcs=LlamaForSequenceClassification(config), **shared,
        )
    durations, training_step = [], trainer.training_step

    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = training_step(*args, **kwargs)
        durations.append(time.perf_counter() - started)
        return result

    trainer.training_step = timed
    trainer.train()
    seconds = statistics.median(durations[1:])
    return {"peer": "TRL", "pairs_per_second": arguments.batch / seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["make_model", "rollout", "learner", "train"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="make_model: folder to copy the tokenizer from")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--mixture-coef", type=float, default=0.0)
    parser.add_argument("--lora", type=int, default=0, help="train: rank of an adapter on all linear layers")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16; learner: autocast")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    report = globals()[arguments.part](arguments)
    report["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(report))


main()
