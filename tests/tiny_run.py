"""A whole run small enough for a test: a tiny student and teacher, 20 prompts, a few steps."""

from __future__ import annotations

import json
from pathlib import Path

from npd.config import RunConfig

TOPICS = ["moon", "river", "tree", "stone", "bread", "glass", "horse", "fire", "snow", "song"]


def write_prompts(path: Path, count: int = 24) -> Path:
    """`count` prompts with a completion and an answer each, in JSONL."""
    rows = [
        {
            "prompt": f"what is {TOPICS[i % len(TOPICS)]} number {i}?",
            "completion": f"it is {TOPICS[i % len(TOPICS)]} {i}.",
            "answer": str(i),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_settings(student: Path, teacher: Path, prompts: Path, run_dir: Path, **sections) -> dict:
    """Settings of a run of a few seconds, as a YAML file would have them; `sections` add to it.

    No report is written: its charts take longer than the run.
    """
    settings = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "student": str(student),
        "teacher": str(teacher),
        "data": {"train": str(prompts), "heldout_size": 4, "max_prompt_tokens": 96},
        "generate": {"max_new_tokens": 12, "shard_size": 5, "batch_size": 8, "dtype": "float32"},
        "score": {"top_k": 8, "row_tokens": 256, "dtype": "float32"},
        "filter": {"drop_truncated": False, "max_repeat": 1.0, "min_response_tokens": 1},
        "train": {
            "batch_size": 6, "row_tokens": 256, "lr": 2e-3, "min_lr": 2e-4, "dtype": "float32",
        },
        "schedule": {
            "epochs": 4, "reuse": 2, "refresh": {"at_epochs": [2]}, "segment_steps": 2,
        },
        "runtime": {"kind": "inline", "device": "cpu", "threads": 1},
        "eval": {"max_new_tokens": 8, "every_steps": 6, "num_samples": 2},
        "checkpoint": {"every_steps": 5},
        "observe": {"report": False},
    }  # fmt: skip
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            settings[name] = {**settings[name], **value}
        else:
            settings[name] = value
    return settings


def tiny_config(*args, **sections) -> RunConfig:
    """`tiny_settings` as a config."""
    return RunConfig.model_validate(tiny_settings(*args, **sections))
