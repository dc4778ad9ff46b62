"""The entry point: runs the command line, and turns errors into one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback

from npd.errors import NpdError

# Progress bars of libraries would tear the live view, and nothing here may look for a hub's news.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    """Run `npd` with the process's arguments and exit."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run(arguments, debug="--debug" in sys.argv[1:]))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run the command line; returns the exit code. `debug` shows the traceback of an error."""
    import click

    from npd.cli import app

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("npd").setLevel(logging.INFO)
    try:
        code = app(arguments, prog_name="npd", standalone_mode=False)
    except click.exceptions.ClickException as error:
        error.show()
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        return 130
    except NpdError as error:
        return _complain(str(error), error.exit_code, debug)
    except Exception as error:  # noqa: BLE001 - the last place where a bug can become one line
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return _complain(f"{cause} (a bug of npd: --debug shows where; please report it)", 1, debug)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    main()
