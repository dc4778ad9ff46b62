"""Renders a chat template once, in a separate process with limits of time and memory.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and code, but
not from nested loops or gigabytes of text, so this script first shows that it terminates. It is run
by its path, without npd, and reads JSON (template, conversations, tokens) from stdin. Its exit
status is 0 even if the template refuses a conversation; the caller reports that.
"""

import json
import resource
import sys
from contextlib import suppress
from typing import Any

CPU_SECONDS, MEMORY, LONGEST = 5, 2**30, 2**24
TOO_LARGE, UNKNOWN = 3, 4


def main() -> int:
    """Render each conversation; returns the exit status."""
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)):
        with suppress(ValueError, OSError):  # macOS has no memory limit
            resource.setrlimit(kind, (most, most))
    given = json.load(sys.stdin)
    try:
        template = _compiled(given["template"])
        is_large = any(
            _is_large(template, turns, given["tokens"]) for turns in given["conversations"]
        )
    except MemoryError:
        return TOO_LARGE
    except ImportError:
        return UNKNOWN
    except Exception:  # noqa: BLE001 - the caller will meet and report the same error
        return 0
    return TOO_LARGE if is_large else 0


def _is_large(template: Any, turns: list[dict[str, str]], tokens: dict[str, str]) -> bool:
    length = 0
    try:
        for piece in template.generate(messages=turns, add_generation_prompt=True, **tokens):
            length += len(piece)
            if length > LONGEST:
                return True
    except MemoryError:
        return True
    except Exception:  # noqa: BLE001 - a refused conversation; the next one may still loop
        return False
    return False


def _compiled(text: str) -> Any:
    """The template compiled as in transformers."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    environment.globals["strftime_now"] = lambda _: "2026-01-01"
    return environment.from_string(text)


if __name__ == "__main__":
    sys.exit(main())
