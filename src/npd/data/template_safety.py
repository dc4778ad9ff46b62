"""Checks that a chat template terminates, within limits of time and memory.

A template is a program that comes with a model. It is first rendered once in a separate process
with limits (`npd.data.template_trial`), and only then in this one. Does not judge its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from npd.config.paths import why_unreadable
from npd.data import template_trial
from npd.errors import ConfigError, ModelError
from npd.text import shown_path

_LONGEST = 2**20  # bytes of a template: some 50 times a long one
# Seconds of wall time; on a busy machine the few CPU seconds of the process can take this long.
_PATIENCE = 300.0
_CONVERSATIONS = (
    [{"role": "user", "content": "What is two plus two?"}],
    [{"role": "user", "content": ""}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is two plus two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
    ],
    [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "12:00"},
    ],
)


def read_template(source: str) -> str:
    """The text of `data.chat_template`, which is a file or the text itself.

    Raises:
        ConfigError: there is no such file, or it is no template.
    """
    if "{{" in source or "{%" in source:
        return source
    path = Path(os.path.expanduser(source))
    what = f"data.chat_template {shown_path(source)}"
    if (why := why_unreadable(path)) is not None:
        raise ConfigError(
            f"{what} {why} (looked from {shown_path(Path.cwd())}): give a Jinja file, or the text "
            "of a template"
        )
    with path.open("rb") as file:
        raw = file.read(_LONGEST + 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: save the file as UTF-8") from error
    if len(raw) > _LONGEST or "{{" not in text or text.lstrip().startswith('{"'):
        raise ConfigError(
            f"{what} is not a Jinja template of under {_LONGEST >> 20} MiB: give a file like "
            "chat_template.jinja, which writes {{ message.content }}"
        )
    return text


def check_template(tokenizer: Any, role: str, path: str | Path) -> None:
    """Check that the chat template of a model's tokenizer, if it has one, can be rendered here.

    Raises:
        ModelError: there are several templates and no default, or rendering takes too much time or
            memory.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ModelError(
                f"the tokenizer of the {role} {path} has several chat templates ({names}) and no "
                f"default: copy the one to use to {Path(path) / 'chat_template.jinja'}"
            )
        template = template["default"]
    if not template:
        return
    if not isinstance(template, str):
        raise ModelError(
            f"the chat template of the {role} {path} is {json.dumps(template, default=str):.60}, "
            "not text: correct it in tokenizer_config.json"
        )
    tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    trouble = _trouble(template, json.dumps(tokens, sort_keys=True))
    if trouble:
        raise ModelError(
            f"the chat template of the {role} {path} {trouble} to render a short conversation: "
            "correct it in chat_template.jinja or tokenizer_config.json"
        )


@lru_cache(maxsize=64)
def _trouble(template: str, tokens: str) -> str:
    """The problem with a template, as a phrase; empty if it terminates in time."""
    given = {"template": template, "conversations": _CONVERSATIONS, "tokens": json.loads(tokens)}
    try:
        # Run by path and isolated (-I), so nothing of npd or the working directory is imported.
        done = subprocess.run(
            [sys.executable, "-I", template_trial.__file__],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {_PATIENCE:.0f} s"
    if done.returncode == template_trial.TOO_LARGE:
        return f"takes more than {template_trial.MEMORY // 2**30} GiB or writes endless text"
    if done.returncode < 0:
        return f"takes more than {template_trial.CPU_SECONDS} s"
    return ""
