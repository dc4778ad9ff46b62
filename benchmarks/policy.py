"""What a policy does on held-out problems: how often it is right, at its best and in k tries.

Answers come from transformers' `generate`, at temperature 1 with nothing cut off, or greedy.
Promises: the draws of one seed are the same whoever asks, and asking leaves torch's generator and
the model's mode as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from tasks import MARK, is_right


@dataclass(frozen=True)
class Tried:
    """Of each problem, how many of its `draws` were right; the policy's entropy over all tokens
    that it wrote, in nats a token."""

    right: tuple[int, ...]
    draws: int
    entropy: float

    def passed(self, k: int) -> float:
        """pass@k: the chance that one of k draws is right, a mean over problems."""
        return sum(pass_at(self.draws, right, k) for right in self.right) / len(self.right)


def pass_at(draws: int, right: int, k: int) -> float:
    """The chance that k of `draws`, `right` of them right, hold one that is (without replacement).

    Unbiased for k fresh draws: 2107.03374, equation 1.

    >>> pass_at(4, 1, 1), pass_at(4, 1, 2), pass_at(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    assert k <= draws, "more tries than draws"
    return 1 - comb(draws - right, k) / comb(draws, k)


def greedy_accuracy(
    model: Any, tokenizer: Any, problems: Sequence[dict[str, str]], max_new: int
) -> float:
    """The share of problems whose greedy answer is right."""
    texts, _ = answers(model, tokenizer, problems, max_new, is_greedy=True)
    return sum(map(_is_right, texts, problems)) / len(problems)


def try_often(
    model: Any,
    tokenizer: Any,
    problems: Sequence[dict[str, str]],
    max_new: int,
    *,
    draws: int,
    seed: int,
) -> Tried:
    """Draw `draws` answers to each problem."""
    import torch

    many = [problem for problem in problems for _ in range(draws)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts, entropy = answers(model, tokenizer, many, max_new, is_greedy=False)
    hits = [*map(_is_right, texts, many)]
    right = [sum(hits[at : at + draws]) for at in range(0, len(hits), draws)]
    return Tried(tuple(right), draws, entropy)


def answers(
    model: Any,
    tokenizer: Any,
    problems: Sequence[dict[str, str]],
    max_new: int,
    *,
    is_greedy: bool,
    batch: int = 512,
) -> tuple[list[str], float]:
    """A response to each problem, and the mean entropy of what its tokens were drawn from."""
    texts: list[str] = []
    total, count, was_training = 0.0, 0, model.training
    model.eval()
    for at in range(0, len(problems), batch):
        ids_BT, entropy_BT, keep_BT = _generate(
            model, tokenizer, problems[at : at + batch], max_new, is_greedy
        )
        texts += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        total += float(entropy_BT[keep_BT].sum())
        count += int(keep_BT.sum())
    model.train(was_training)
    return texts, total / count


def _generate(
    model: Any, tokenizer: Any, problems: Sequence[dict[str, str]], max_new: int, is_greedy: bool
) -> tuple[Any, Any, Any]:
    """B problems, T tokens: what was written, its entropies, and which of it counts."""
    import torch

    asked = [[{"role": "user", "content": problem["prompt"]}] for problem in problems]
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    draw = {} if is_greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    eos = tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"],
            max_new_tokens=max_new, do_sample=not is_greedy, **draw,
            eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        ids_BT = out.sequences[:, prompts["input_ids"].shape[1] :]
        logp_BTV = torch.stack(out.logits, 1).float().log_softmax(-1)
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    is_end_BT = (ids_BT == eos).int()
    keep_BT = is_end_BT.cumsum(1) - is_end_BT == 0  # up to the end token, itself included
    return ids_BT, entropy_BT, keep_BT


def _is_right(text: str, problem: dict[str, str]) -> bool:
    return is_right(text, problem["answer"].removeprefix(MARK))
