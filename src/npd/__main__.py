"""The entry point: runs the command line, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run could not go on, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

from npd.errors import NpdError

# Progress bars of libraries would tear the live view, and nothing here may look for a hub's news.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended: 128 + SIGINT


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the moment, which the live panel replaces by itself.

    A handler that kept the terminal's own stream would write into the panel, not above it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        sys.stderr.write(f"{self.format(record)}\n")


def main() -> None:
    """Run `npd` with the process's arguments and exit."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run(arguments, debug="--debug" in sys.argv[1:]))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run the command line; returns the exit code. `debug` shows the traceback of an error."""
    from npd.cli import app

    return outcome(
        lambda: app(arguments or ["--help"], prog_name="npd", standalone_mode=False), debug=debug
    )


def outcome(work: Callable[[], object], *, debug: bool = False) -> int:
    """Do `work` with log lines on; returns the exit code it ends in (what it returns, or 0).

    An error or an interrupt becomes one line at most, as the command line has it; scripts that
    call the library may end in this too.
    """
    import typer

    # Its public name differs between the versions of typer that we allow.
    usage_error = typer.BadParameter.__mro__[1]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ToStderr()])
    logging.getLogger("npd").setLevel(logging.INFO)
    try:
        code = work()
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except NpdError as error:
        return _complain(str(error), error.exit_code, debug)
    except Exception as error:  # noqa: BLE001 - the last place where a bug can become one line
        if isinstance(error, usage_error):
            return _complain(_usage(error), 2, debug)
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return _complain(f"{cause} (a bug of npd: --debug shows where; please report it)", 1, debug)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int, debug: bool) -> int:
    """Write `error: ...` on one line, whatever a library put into its message."""
    if debug:
        traceback.print_exc()
    lines = (line.strip() for line in message.splitlines())
    sys.stderr.write(f"error: {'; '.join(line for line in lines if line)}\n")
    return code


def _usage(error: object) -> str:
    """What typer found wrong with the arguments, and which help to read."""
    message = str(getattr(error, "format_message")()).rstrip(".")  # noqa: B009 (typed as object)
    command = getattr(getattr(error, "ctx", None), "command_path", "npd")
    return f"{message[:1].lower()}{message[1:]}: see {command} --help"


if __name__ == "__main__":
    main()
