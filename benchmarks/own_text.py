"""What a student does on text of its own: sampled accuracy, and how far the teacher is from it.

Held-out KL is measured on given texts, and greedy accuracy looks at modes only. Training on own
text is meant for what a student does after what it wrote itself; that is measured here, by plain
transformers, apart from npd's own engine and loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npd.data.chat_tokenizer import ChatTokenizer
from npd.types import Message, Prompt
from tasks import MARK, is_right

_BATCH = 250


def own_text(
    student: Path, teacher: Path, problems: Sequence[dict[str, str]], max_new: int
) -> dict[str, float]:
    """Of one answer to each problem, sampled at temperature 1 with a fixed seed.

    `sampled_accuracy`: share of right ones. `own_kl`: KL(teacher || student) over the whole
    vocabulary, mean over their tokens, the end's included (nats).
    """
    import torch
    from transformers import AutoModelForCausalLM

    chat = ChatTokenizer.load(str(student))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (student, teacher)
    )
    torch.manual_seed(0)
    right, divergence, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(problems), _BATCH):
            batch = problems[start : start + _BATCH]
            asked = [
                Prompt(i, (Message("user", row["prompt"]),)) for i, row in enumerate(batch, start)
            ]
            prompts = [prompt.prompt_ids.tolist() for prompt in chat.encode_all(asked)]
            ids, mask, begin = sample(ours, prompts, max_new)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
            log_q, log_p = (
                model(**inputs).logits[:, begin - 1 : -1].float().log_softmax(-1)
                for model in (ours, theirs)
            )
            is_written = mask[:, begin:].bool()
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            divergence += float(kl[is_written].sum())
            tokens += int(is_written.sum())
            for row, answer, written in zip(batch, ids[:, begin:], is_written, strict=True):
                text = chat.decode(answer[written].tolist())
                right += is_right(text, row["answer"].removeprefix(MARK))
    return {"sampled_accuracy": right / len(problems), "own_kl": divergence / tokens}


def sample(model: Any, prompts: Sequence[Sequence[int]], max_new: int) -> tuple[Any, Any, int]:
    """Ids and mask `[B, prompt + answer]`, prompts padded on the left, and where answers begin."""
    import torch

    longest = max(map(len, prompts))
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = (ids != pad).long()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ids = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new, **options)
    # What follows the first end is padding.
    ends = (ids[:, longest:] == end).long()
    is_after = ends.cumsum(1) - ends > 0
    return ids, torch.cat([mask, (~is_after).long()], dim=1), longest
