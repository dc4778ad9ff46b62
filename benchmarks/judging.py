"""How good a saved student of a pair is, on prompts that nobody trained on.

On the teacher's text, as npd's trainer evaluates (held-out KL, agreement) and by ROUGE-L; and on
the student's own text, where a student meets its own mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import pair
from npd.config import ScoreConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.engines.capabilities import HELDOUT_TOP_K
from npd.evaluate import Match, heldout_kl
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.models.loading import decoding, load_model
from npd.score import build_scorer
from npd.store.shards import read_scored
from npd.types import EncodedPrompt, Rollout, SampleRequest, Scored
from rouge import rouge_l


def on_teacher_text(made: pair.Pair, student: Path) -> dict[str, Any]:
    """Held-out KL and agreement; ROUGE-L of greedy responses against the teacher's."""
    scored, model = read_scored(made.heldout_scored), _load(made, student)
    match = _match(made, model, scored)
    answers = _answers(made, model, scored)
    return {
        "kl": match.kl,
        "agreement": match.agreement,
        "rouge_l": mean_rouge(made, answers),
        "answers": answers,
    }


def on_own_text(made: pair.Pair, student: Path) -> dict[str, Any]:
    """KL(teacher || student) and agreement on what the student itself writes, at temperature 1."""
    return _on_own_text(made, _load(made, student))


def glance(made: pair.Pair, student: Path) -> dict[str, float]:
    """Held-out KL and agreement on the teacher's text, KL on the student's own, and the grade of
    its greedy responses where the pair has one.
    """
    scored, model = read_scored(made.heldout_scored), _load(made, student)
    match = _match(made, model, scored)
    own = _on_own_text(made, model)
    found = {"kl": match.kl, "agreement": match.agreement, "own_kl": own["own_kl"]}
    if made.is_graded:
        found |= made.grade(_answers(made, model, scored))
    return found


def _answers(made: pair.Pair, model: Any, scored: Sequence[Scored]) -> list[str]:
    """Greedy responses to the held-out prompts, in order."""
    written = _write(made, model, scored, temperature=0.0)
    return [made.chat.decode(rollout.response_ids) for rollout in written]


def _on_own_text(made: pair.Pair, model: Any) -> dict[str, Any]:
    written = _write(made, model, read_scored(made.heldout_scored), temperature=1.0)
    scorer = build_scorer(
        ScoreConfig(top_k=HELDOUT_TOP_K, row_tokens=made.setting.row_tokens, dtype=made.dtype),
        teacher=made.teacher,
        vocab_size=made.chat.vocab_size,
        needs_ifd=False,
        needs_student_pass=False,
        support="topk",
        device=made.setting.device,
        trust_remote_code=False,
        seed=0,
    )
    scored = [item for item in scorer.score(written) if isinstance(item, Scored)]
    scorer.close()
    match = _match(made, model, scored)
    return {"own_kl": match.kl, "own_agreement": match.agreement, "own_tokens": match.num_tokens}


def _load(made: pair.Pair, student: Path) -> Any:
    return load_model(student, device=made.setting.device)


def _computing(made: pair.Pair, model: Any) -> Any:
    """Autocast, unless the pair computes in float32."""
    is_cast = made.dtype == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=is_cast)


def _match(made: pair.Pair, model: Any, scored: Sequence[Scored]) -> Match:
    with _computing(made, model):
        return heldout_kl(model, scored, made.setting.row_tokens, 512)


def mean_rouge(made: pair.Pair, answers: Sequence[str]) -> float:
    """ROUGE-L of answers to the held-out prompts against the teacher's, on average."""
    teacher = [made.chat.decode(s.rollout.response_ids) for s in read_scored(made.heldout_scored)]
    return mean(rouge_l(*texts) for texts in zip(answers, teacher, strict=True))


def _write(
    made: pair.Pair, model: Any, scored: Sequence[Scored], *, temperature: float
) -> list[Rollout]:
    """The student's responses to the held-out prompts, each with a seed of its own."""
    chat: ChatTokenizer = made.chat
    sampling = Sampling(
        max_new_tokens=made.setting.max_response,
        stop_ids=chat.stop_ids,
        pad_id=chat.pad_id,
        temperature=temperature,
        top_p=1.0,
        batch_size=made.setting.write_batch,
        vocab_size=chat.vocab_size,
    )
    requests = [
        SampleRequest(i, i, EncodedPrompt(i, s.rollout.prompt_ids, s.rollout.header_ids))
        for i, s in enumerate(scored)
    ]
    with _computing(made, model), decoding(model):
        return list(generate_with(model, requests, sampling, with_logprobs=False))
