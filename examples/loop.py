"""Near-Policy Distillation (arXiv 2605.05940) in one file: torch, transformers, nothing of npd.

A student learns from a teacher on text that an earlier snapshot of the student wrote:

    every `reuse` epochs:
        gen <- a snapshot of the student            only now and then: at `refresh_at`
        D   <- one response by gen to each prompt   generate()
        the teacher reads D: top-k log-probs, NLLs  score()
        drop samples extreme for either model       judge()
        several epochs of packed training on D      train_step()

The library computes the same (tests/test_example_loop.py). It also drops short and repeating texts,
generates while it trains, survives crashes, never holds all logits. Start from a student that was
fine-tuned on teacher text and shares the teacher's tokenizer. FILE has lines {"prompt": "..."}.

    python examples/loop.py --student DIR --teacher DIR --prompts FILE.jsonl --out DIR
"""

import argparse
import copy
import json
import random
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@dataclass(frozen=True)
class Settings:
    """The paper's values where it gives them. Options are JSON: --refresh_at "[4]" --bf16 false."""

    epochs: int = 10
    reuse: int = 5  # epochs on one D
    refresh_at: tuple[int, ...] = (5,)  # after which epochs gen becomes the student of that time
    max_new_tokens: int = 512
    drop_truncated: bool = True
    top_k: int = 10
    low: float = 0.0  # keep low - tolerance <= Δ-IFD <= high; tolerance 0 is the printed rule
    high: float = 0.8
    tolerance: float = 0.05
    min_nll: float = 0.05  # nats; a response that both models find easier than this is kept
    kd_weight: float = 0.9
    lr: float = 1e-5
    min_lr: float = 1e-6
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 64  # samples a step, packed into as many rows as they need
    row_tokens: int = 4096  # the paper: 32768; here the attention mask is [row, row]
    bf16: bool = True  # computing; the student's weights and Adam's moments stay float32
    seed: int = 0


@dataclass
class Sample:
    """One rollout of L response tokens, filled in from stage to stage."""

    id: int
    seed: int
    prompt: list[int]  # token ids, up to where the response begins
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # log p_gen(y_t | x, y_<t)
    topk_ids: torch.Tensor | None = None  # [L, k], the teacher's likeliest
    topk_logprobs: torch.Tensor | None = None  # [L, k], true ones: they do not add up to 1
    nlls: tuple[float, ...] = ()  # nats a token: teacher, teacher without prompt, gen, without
    delta_ifd: float = np.nan
    verdict: str = "truncated"
    uses: int = 0


def encode(tokenizer, text: str) -> list[int]:
    """One user message as token ids, up to where the assistant begins."""
    if not tokenizer.chat_template:
        return tokenizer(text).input_ids or [tokenizer.eos_token_id]
    turns = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def generate(gen, batch: list[Sample], max_new_tokens: int, eos_id: int, vocab_size: int) -> None:
    """Gen writes the responses, at temperature 1: samples of its own distribution."""
    width = max(len(x.prompt) for x in batch)
    pads = [width - len(x.prompt) for x in batch]  # on the left
    ids = torch.tensor([[0] * pad + x.prompt for pad, x in zip(pads, batch, strict=True)])
    places = torch.arange(width + max_new_tokens) - torch.tensor(pads)[:, None]
    streams = [np.random.Generator(np.random.Philox(key=x.seed)) for x in batch]
    uniforms = torch.tensor(np.array([stream.random(max_new_tokens) for stream in streams]))
    kv = DynamicCache(config=gen.config)
    for t in range(max_new_tokens):
        seen = places[:, : width + t]
        mask, at = (seen >= 0).long(), seen[:, -ids.shape[1] :].clamp(min=0)
        out = gen(ids, attention_mask=mask, position_ids=at, past_key_values=kv, logits_to_keep=1)
        logprobs = out.logits[:, -1].float().log_softmax(-1)
        # Inverse CDF of the sample's own uniforms: so its text does not depend on the batch.
        cdf = logprobs[:, :vocab_size].exp().double().cumsum(-1)
        ids = torch.searchsorted(cdf, uniforms[:, [t]] * cdf[:, -1:], right=True)
        chosen = logprobs.gather(-1, ids.clamp_(max=vocab_size - 1))
        for x, token, logprob in zip(batch, ids.tolist(), chosen.tolist(), strict=True):
            if x.response[-1:] != [eos_id]:
                x.response += token
                x.logprobs += logprob
        if all(x.response[-1] == eos_id for x in batch):
            break


def pack(samples: list[Sample], capacity: int) -> list[list[Sample]]:
    """Samples into rows of at most `capacity` tokens (longer ones alone), longest first."""
    rows, room = [], 0
    for x in sorted(samples, key=lambda x: -len(x.prompt + x.response)):
        if len(x.prompt + x.response) > room:
            rows, room = [*rows, []], capacity
        rows[-1].append(x)
        room -= len(x.prompt + x.response)
    return rows


def predict(model, contexts: list[list[int]], row: list[Sample]):
    """Log-probs at a row's N response positions: of all tokens [N, V], of the text's own [N, 1]."""
    # Documents end to end. Positions restart at each and none sees another, so packing changes no
    # number. A response's last token predicts nothing and is left out.
    ids, places, keep = [], [], []
    for context, x in zip(contexts, row, strict=True):
        document = context + x.response[:-1]
        keep += range(len(ids) + len(context) - 1, len(ids) + len(document))
        ids += document
        places += range(len(document))
    owner = torch.tensor(places).eq(0).cumsum(0)  # which document a token belongs to
    logits = model(
        input_ids=torch.tensor([ids]),
        attention_mask=(owner[:, None] == owner).tril()[None, None],
        position_ids=torch.tensor([places]),
        logits_to_keep=torch.tensor(keep),
        use_cache=False,
    ).logits[0]
    logprobs = logits.float().log_softmax(-1)
    return logprobs, logprobs.gather(-1, torch.tensor([[y] for x in row for y in x.response]))


@torch.no_grad()
def score(teacher, gen, row: list[Sample], header: list[int], top_k: int, vocab_size: int) -> None:
    """Prefills only: the teacher with and without the prompt, gen without (with: it wrote it)."""
    logprobs, own = predict(teacher, [x.prompt for x in row], row)
    alone = [predict(model, [header] * len(row), row)[1] for model in (teacher, gen)]
    top = logprobs[:, :vocab_size].topk(top_k)
    parts = [part.split([len(x.response) for x in row]) for part in (own, *alone, *top)]
    for x, *own_logprobs, x.topk_logprobs, x.topk_ids in zip(row, *parts, strict=True):
        nll, nll_alone, gen_alone = (-part.mean().item() for part in own_logprobs)
        x.nlls = (nll, nll_alone, -float(np.mean(x.logprobs)), gen_alone)


def judge(x: Sample, s: Settings) -> str:
    """Keep what is near the student's policy and the teacher's. IFD = NLL / NLL without prompt."""
    teacher, teacher_alone, student, student_alone = x.nlls
    x.delta_ifd = teacher / max(teacher_alone, 1e-3) - student / max(student_alone, 1e-3)
    if max(teacher, student) < s.min_nll or s.low - s.tolerance <= x.delta_ifd <= s.high:
        return "kept"
    # Degenerate: the student finds its text harder than the teacher does. Disconnect: far easier.
    return "degenerate" if x.delta_ifd < s.low else "disconnect"


def train_step(student, optimizer, batch: list[Sample], s: Settings) -> tuple[float, float]:
    """One optimiser step; returns its loss and KL(student || gen), how far off-policy D now is."""
    num_tokens = sum(len(x.response) for x in batch)  # of the whole step: rows do not matter
    loss = drift = 0.0
    for row in pack(batch, s.row_tokens):
        with torch.autocast(student.device.type, torch.bfloat16, enabled=s.bf16):
            logprobs, own = predict(student, [x.prompt for x in row], row)
        teacher = torch.cat([x.topk_logprobs for x in row])
        on_support = logprobs.gather(-1, torch.cat([x.topk_ids for x in row]))
        kd = (teacher.exp() * (teacher - on_support)).sum()
        row_loss = ((1 - s.kd_weight) * -own.sum() + s.kd_weight * kd) / num_tokens
        row_loss.backward()
        log_rho = own.detach()[:, 0] - torch.tensor([y for x in row for y in x.logprobs])
        drift += (log_rho.exp() * (log_rho - 1) + 1).sum().item() / num_tokens
        loss += row_loss.item()
    torch.nn.utils.clip_grad_norm_(student.parameters(), s.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, drift


def distill(student, teacher, tokenizer, prompts, s: Settings, mix=lambda *key: hash(key) % 2**63):
    """Train `student` in place; `mix` decides the arbitrary. Returns samples, (loss, drift)s."""
    tables = {id(student.get_input_embeddings().weight), id(student.get_output_embeddings().weight)}
    decayed = [p for p in student.parameters() if p.dim() >= 2 and id(p) not in tables]
    others = [p for p in student.parameters() if p.dim() < 2 or id(p) in tables]
    optimizer = torch.optim.AdamW(others, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer.add_param_group({"params": decayed, "weight_decay": s.weight_decay})
    eos_id, vocab_size = tokenizer.eos_token_id, 1 + max(tokenizer.get_vocab().values())
    contexts, header = [encode(tokenizer, text) for text in prompts], encode(tokenizer, "")
    samples, steps = [], []
    for epoch in range(0, s.epochs, s.reuse):
        if epoch == 0 or epoch in s.refresh_at:
            gen = copy.deepcopy(student).eval()
            for p in gen.parameters():
                p.data = p.data.bfloat16().to(teacher.dtype)  # a snapshot is published in bf16
        order = list(range(len(prompts)))
        random.Random(mix(s.seed, epoch // s.reuse)).shuffle(order)
        D = [Sample(i, mix(s.seed, 1, i), contexts[p]) for i, p in enumerate(order, len(samples))]
        for start in range(0, len(D), s.batch_size):
            generate(gen, D[start : start + s.batch_size], s.max_new_tokens, eos_id, vocab_size)
        whole = [x for x in D if x.response[-1] == eos_id or not s.drop_truncated]
        for row in pack(whole, s.row_tokens):
            score(teacher, gen, row, header, s.top_k, vocab_size)
            for x in row:
                x.verdict = judge(x, s)
        print(f"after epoch {epoch}:", dict(Counter(x.verdict for x in D)))
        samples += D
        while left := [x for x in D if x.verdict == "kept" and x.uses < s.reuse]:
            batch = sorted(left, key=lambda x: (x.uses, mix(s.seed, x.uses, x.id)))[: s.batch_size]
            done = sum(x.uses if x.verdict == "kept" else s.reuse for x in samples)
            cosine = 0.5 * (1 + np.cos(np.pi * done / (s.epochs * len(prompts))))
            for group in optimizer.param_groups:
                group["lr"] = s.min_lr + (s.lr - s.min_lr) * cosine
            steps.append(train_step(student, optimizer, batch, s))
            for x in batch:
                x.uses += 1
            print(f"step {len(steps)}: loss {steps[-1][0]:.4f}, drift {steps[-1][1]:.4f}")
    return samples, steps


def main(argv: list[str] | None = None) -> None:
    """Read models and prompts, distil, write the student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("student", "teacher", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name}", type=json.loads, default=setting.default)
    args = parser.parse_args(argv)
    s = Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="sdpa")
    student = load(args.student, dtype=torch.float32).to(device)
    teacher = load(args.teacher, dtype=torch.bfloat16 if s.bf16 else torch.float32).to(device)
    with device:
        distill(student, teacher, tokenizer, prompts, s)
    student.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
