"""Texts of a student, with noise planted, as a data set; and what both models say of each.

Everything is written and scored by npd's own stages from configs that `npd run` takes: the preset
`npd` with `generate.source: dataset`, where the student's side comes from a pass of its own. What
is finished stays in its folder and is not made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from filter_rules import Labelled
from noise import PROSE, Response, Texts, plant
from npd import stages
from npd.config import RunConfig
from npd.config.load import load_config, nested
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import DataError, ModelError
from npd.filters import prefilter
from npd.store.shards import read_rollouts, read_scored
from npd.types import FinishReason, SampleStats
from npd.workers import generated_stats, scored_stats

SCORED = {"generate.source": "dataset", "schedule.refresh": "never", "score.student_pass": "always"}
"""What makes the preset `npd` score and train on a data set's own completions."""
HOT = 2.0
"""The temperature of `hot` texts."""


@dataclass(frozen=True)
class Made:
    """A data set with its scores. `samples` are in the order of a run; `prefiltered` counts by kind
    (empty: clean) and reason what the pre-filters cut, before the scores that `samples` have."""

    path: Path
    samples: list[Labelled]
    prefiltered: dict[tuple[str, str], int]
    num_kinds: dict[str, int]


def written(
    folder: Path, make: Callable[[Mapping[str, Any]], Path], temperature: float
) -> dict[int, str]:
    """The student's text for each prompt, by index. `make` writes a run.yaml of given values."""
    path = folder / f"texts-{temperature:g}.json"
    if not path.exists():
        config = load_config(make({"generate.temperature": temperature})).config
        rollouts = folder / f"texts-{temperature:g}.arrow"
        rollouts.unlink(missing_ok=True)
        stages.generate(config, rollouts)
        chat = ChatTokenizer.load(config.student)
        found = {r.prompt_index: chat.decode(r.response_ids) for r in read_rollouts(rollouts)}
        path.write_text(json.dumps(found))
        rollouts.unlink()
    return {int(index): text for index, text in json.loads(path.read_text()).items()}


def data_set(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, str]],
    make: Callable[[Mapping[str, Any]], Path],
    texts: Texts,
    *,
    share: float,
    seed: int,
) -> list[Response]:
    """Write `<name>.jsonl` of the student's texts, noise in `share` of them; `rows`: its prompts.

    Prompts that the student has no word for are left out.
    """
    path = folder / f"{name}.jsonl"
    labels = folder / f"{name}.labels.json"
    if not labels.exists():
        by_prompt = {row["prompt"]: row for row in rows}
        prompts = [row["prompt"] for row in rows]
        plain = {prompts[i]: text for i, text in written(folder, make, 1.0).items()}
        hot = {prompts[i]: text for i, text in written(folder, make, HOT).items()}
        clean = [(prompt, plain[prompt]) for prompt in prompts if plain[prompt].strip()]
        found = plant(clean, hot, texts, share=share, seed=seed)
        with path.open("w") as file:
            for response in found:
                record = {**by_prompt[response.prompt], "completion": response.text}
                file.write(json.dumps(record) + "\n")
        labels.write_text(json.dumps([[r.prompt, r.text, r.kind] for r in found]))
    return [Response(*values) for values in json.loads(labels.read_text())]


def scored(
    path: Path,
    responses: Sequence[Response],
    config: RunConfig,
    right: Callable[[int, str], bool] | None = None,
) -> Made:
    """The data set at `path` read by both models; `right`: whether a prompt's response is."""
    done = path.with_suffix(".scores.json")
    if not done.exists():
        _score(path, responses, config, right, done)
    record = json.loads(done.read_text())
    samples = [
        Labelled(_stats(values), kind, is_right, worst)
        for values, kind, is_right, worst in record["samples"]
    ]
    cut = {(kind, why): count for kind, why, count in record["prefiltered"]}
    return Made(path, samples, cut, dict(Counter(response.kind for response in responses)))


def _score(
    path: Path,
    responses: Sequence[Response],
    config: RunConfig,
    right: Callable[[int, str], bool] | None,
    done: Path,
) -> None:
    rollouts, out = path.with_suffix(".rollouts.arrow"), path.with_suffix(".scored.arrow")
    for file in (rollouts, out):
        file.unlink(missing_ok=True)
    stages.generate(config, rollouts)
    stages.score(config, rollouts, out)
    cut: Counter[tuple[str, str]] = Counter()
    for rollout in read_rollouts(rollouts):
        verdict = prefilter(generated_stats(rollout), config.filter)
        if not verdict.keep:
            cut[responses[rollout.prompt_index].kind, verdict.reason] += 1
    samples = []
    for item in read_scored(out):
        index = item.rollout.prompt_index
        is_right = None if right is None else right(index, responses[index].text)
        worst = float(-item.teacher_logprobs.min())
        samples.append([scored_stats(item), responses[index].kind, is_right, worst])
    counts = [[kind, why, count] for (kind, why), count in sorted(cut.items())]
    done.write_text(json.dumps({"samples": samples, "prefiltered": counts}))
    for file in (rollouts, out):
        file.unlink()


def _stats(values: Sequence[Any]) -> SampleStats:
    stats = SampleStats(*values)
    return stats._replace(finish=FinishReason(stats.finish))


def write_run(path: Path, values: Mapping[str, Any]) -> Path:
    """A run.yaml of dotted values, which `npd run` takes too."""
    path.write_text(json.dumps(nested(dict(values)), indent=1, default=str) + "\n")
    return path


# -- Real text ---------------------------------------------------------------------------------


# That of `topics.yaml`, which the student was warmed up with.
_SYSTEM = "Answer in one short sentence."
# Of the file, for each seed.
_QUESTIONS = 80


@dataclass(frozen=True)
class Models:
    """The pair of `topics.yaml`, and questions for it: JSONL, and the column they are in."""

    student: Path
    teacher: Path
    questions: Path
    column: str


def check(models: Models, num_seeds: int) -> None:
    """Raises ModelError or DataError, before anything is run, where a model or a question lacks."""
    for role in ("student", "teacher"):
        if not (getattr(models, role) / "config.json").is_file():
            raise ModelError(
                f"--{role} {getattr(models, role)}: no model there: run `make demo`, "
                "then `npd run benchmarks/topics.yaml`"
            )
    for seed in range(num_seeds):
        found = len(_questions(models, seed))
        if found < _QUESTIONS:
            raise DataError(
                f"--data {models.questions} has {seed * _QUESTIONS + found} questions, "
                f"{num_seeds} seeds take {num_seeds * _QUESTIONS}: name a larger file, or set "
                "--real-seeds"
            )


def _questions(models: Models, seed: int) -> list[str]:
    """Those of a seed, each one's own part of the file. Raises DataError."""
    file, column, first = models.questions, models.column, seed * _QUESTIONS
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, first, first + _QUESTIONS)]
    except OSError as error:
        raise DataError(
            f"--data {file}: {error.strerror}: name a JSONL file with a question a line"
        ) from error
    except ValueError as error:
        raise DataError(f"--data {file} is not JSONL: {error}") from error
    for number, row in enumerate(rows, first + 1):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise DataError(f"--data {file}:{number}: no text in column {column!r}: set --column")
    return [row[column] for row in rows]


def real_data(models: Models, folder: Path, *, share: float, seed: int) -> Made:
    """The student's answers to some questions of a file, noise planted, scored."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": question} for question in _questions(models, seed)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write = partial(_real_yaml, models, folder, seed, prompts)
    found = data_set(folder, "noisy", rows, write, PROSE, share=share, seed=seed)
    path = folder / "noisy.jsonl"
    config = load_config(_real_yaml(models, folder, seed, path, SCORED)).config
    return scored(path, found, config)


def _real_yaml(
    models: Models, folder: Path, seed: int, data: Path, values: Mapping[str, Any]
) -> Path:
    own = {
        "preset": "npd",
        "seed": seed,
        "student": models.student,
        "teacher": models.teacher,
        "data.train": data,
        "data.system": _SYSTEM,
        "data.heldout_size": 0,
        "data.max_prompt_tokens": 512,
        "generate.max_new_tokens": 64,
        "generate.batch_size": _QUESTIONS,
        "filter.drop_truncated": False,
        "score.row_tokens": 2048,
        "eval.source": "none",
        "runtime.kind": "inline",
        "runtime.device": "cpu",
        "runtime.threads": 1,
    }
    return write_run(folder / "run.yaml", own | dict(values))
