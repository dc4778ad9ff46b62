"""One line for each test file as it ends, in place of a dot for each test.

Only where no more is asked for: `pytest -v` names each test as usual.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest


class FileProgress:
    """Counts outcomes by file; a file has ended when its worker reports from the next one."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._open: dict[str, tuple[str, float, Counter[str]]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """No dot for a test that passed or was skipped; failures and errors keep their letter."""
        if report.passed:
            return ("passed", "", "") if report.when == "call" else ("", "", "")
        is_expected = hasattr(report, "wasxfail")
        return ("skipped", "", "") if report.skipped and not is_expected else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        """Count one phase of a test; write the line of its worker's file if that is a new one."""
        node = getattr(report, "node", None)
        worker = "" if node is None else node.gateway.id
        file = report.nodeid.partition("::")[0]
        if worker in self._open and self._open[worker][0] != file:
            self._write(worker)
        _, _, counts = self._open.setdefault(worker, (file, time.monotonic(), Counter()))
        if report.when == "call" or not report.passed:
            counts[report.outcome] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        """Write the lines of the files that were last."""
        for worker in list(self._open):
            self._write(worker)

    def _write(self, worker: str) -> None:
        file, start, counts = self._open.pop(worker)
        says = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(f"{file}: {says} in {time.monotonic() - start:.0f} s")


def pytest_configure(config):
    """Only the process with the terminal reports."""
    is_worker = hasattr(config, "workerinput")
    if not is_worker and config.option.verbose <= 0 and not config.option.collectonly:
        config.pluginmanager.register(FileProgress(config), "file_progress_lines")
