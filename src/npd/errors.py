"""The exceptions of npd, in one tree.

Every message says what is wrong, where, and the remedy, in one line that a user can act on. The
user can fix an `InputError` (exit code 2); a `RunError` happens during a run (exit code 1). Broken
invariants of npd itself are assertions. Secrets are masked when a message is made.
"""

from __future__ import annotations

from npd.redaction import mask


class NpdError(Exception):
    """Base of all errors that npd raises. `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(NpdError):
    """The user's input cannot be used: config, data, model directories, command line."""

    exit_code = 2


class ConfigError(InputError):
    """Invalid config values, keys or combinations; each problem is one line.

    >>> ConfigError("train.lr: ...", "seed: ...").problems
    ('train.lr: ...', 'seed: ...')
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems, one line each."""
        return tuple(map(str, self.args))


class DataError(InputError):
    """A data file is missing or empty, or lacks something the run needs."""


class ModelError(InputError):
    """A model directory or tokenizer cannot be used, or student and teacher do not match."""


class RunError(NpdError):
    """The run cannot continue: non-finite loss, full disk, a worker that keeps dying."""


class StoreError(RunError):
    """A file of the run directory is missing, truncated, or does not match its checksum."""


class WorkerLostError(RunError):
    """A worker process died or timed out during a call."""
