"""The entry point: runs the command line, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

from npd.errors import ConfigError, NpdError
from npd.redaction import learn_environment
from npd.terminal import LineFormatter, is_reader_gone, lenient_streams, safe_text

# Libraries' progress bars would break the live view, and no library may query a hub for updates. An
# unreachable hub would be reported twice per attempt before npd's own error.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_INTERRUPTED = 130  # the shells' exit code after Ctrl-C: 128 + SIGINT


class _ToStderr(logging.Handler):
    """Logs to the current `sys.stderr`, which the live panel replaces while it is shown.

    A handler on the terminal's own stream would write into the panel instead of above it.
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
        lambda: app(arguments or ["--help"], prog_name="npd", standalone_mode=False),
        debug=debug,
        is_run=arguments[:1] == ["run"],
    )


def outcome(work: Callable[[], object], *, debug: bool = False, is_run: bool = True) -> int:
    """Do `work` with logging on; returns its exit code, or 0 if it returns none.

    An error or an interrupt becomes at most one line, as on the command line; scripts that call the
    library can use this too. A closed pipe (silently) or a full disk may lose printed text, but not
    the results of a run, which are files.
    """
    with lenient_streams() as out:
        code = _outcome(work, debug)
        out.flush()
        return code if out.error is None else _lost(out.error, code, is_run=is_run)


def _lost(error: OSError, code: int, *, is_run: bool) -> int:
    """Report that output was lost; returns the exit code."""
    if is_reader_gone(error):
        return code
    what = f"cannot write to standard output ({error.strerror}): part of the output is missing"
    return _complain(what, code=code if code or is_run else 1, debug=False)


def _outcome(work: Callable[[], object], debug: bool) -> int:
    import typer

    # The public name of this class differs between the supported versions of typer.
    usage_error = typer.BadParameter.__mro__[1]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    learn_environment(os.environ)
    handler = _ToStderr()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("npd").setLevel(logging.INFO)
    try:
        code = work()
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except ConfigError as error:
        return _complain(*error.problems, code=error.exit_code, debug=debug)
    except NpdError as error:
        return _complain(str(error), code=error.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001 - the top level turns a bug into one line
        if isinstance(error, usage_error):
            return _complain(_usage(error), code=2, debug=debug)
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        report = f"{cause} (a bug of npd: --debug shows where; please report it)"
        return _complain(report, code=1, debug=debug)
    return code if isinstance(code, int) else 0


def _complain(*problems: str, code: int, debug: bool) -> int:
    """Write one `error: ...` line for each problem, even if a library's message has several."""
    if debug:
        sys.stderr.write(safe_text(traceback.format_exc()))
    for problem in problems:
        lines = (line.strip() for line in problem.splitlines())
        sys.stderr.write(f"error: {safe_text('; '.join(line for line in lines if line))}\n")
    return code


def _usage(error: object) -> str:
    """Typer's error about the arguments, with the --help command to run."""
    message = str(getattr(error, "format_message")()).rstrip(".")  # noqa: B009 (typed as object)
    message = message.replace("Value error, embedded null byte", "it contains a NUL character")
    message = message.replace(" (Possible options: --help)", "")
    parameters = getattr(getattr(getattr(error, "ctx", None), "command", None), "params", [])
    if hasattr(error, "possibilities") and any(known.name == "sets" for known in parameters):
        message += ", settings are given as --set KEY=VALUE"
    command = getattr(getattr(error, "ctx", None), "command_path", "npd")
    return f"{message[:1].lower()}{message[1:]}: see {command} --help"


if __name__ == "__main__":
    main()
