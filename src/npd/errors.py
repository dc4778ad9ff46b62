"""The one exception tree of npd.

Every message says what is wrong, where, and the remedy, in one line a user can act on. An
`InputError` is the user's to mend (exit code 2); a `RunError` happened while running (exit code 1).
Broken invariants of our own are plain assertions, never these.
"""


class NpdError(Exception):
    """Base of everything npd raises on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


class InputError(NpdError):
    """The user's input cannot be used: config, data, model directories, command line."""

    exit_code = 2


class ConfigError(InputError):
    """A config value, key or combination that cannot work."""


class DataError(InputError):
    """A data file that is missing, empty, or lacks what the run needs."""


class ModelError(InputError):
    """A model directory or tokenizer that cannot be used, or a pair that does not fit together."""


class RunError(NpdError):
    """The run could not go on: non-finite loss, full disk, a worker that keeps dying."""


class StoreError(RunError):
    """A file of the run directory is missing, truncated, or does not match its checksum."""


class WorkerLostError(RunError):
    """A worker process died or timed out while it held a call."""
