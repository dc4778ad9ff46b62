"""One run from config to student: check, open the directory, start the crew, drive, report.

This is the wiring and reads like the diagram; every part of it lives elsewhere.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from npd.config import RunConfig
from npd.control.controller import Controller, Ending
from npd.control.crew import num_scorers, spawn_crew
from npd.control.dispatch import Dispatcher
from npd.control.monitor import Monitor
from npd.control.opening import open_directory
from npd.control.plan import Plan
from npd.control.preparation import Prepared, prepare
from npd.control.story import tell
from npd.errors import RunError
from npd.observe.live import View, make_view
from npd.observe.report import ReportData, build_report
from npd.observe.trace import export_perfetto
from npd.observe.trackers import build_trackers
from npd.runtime import build_runtime
from npd.store.files import write_atomic
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left. `student` is None when it was interrupted; then `resume` goes on."""

    directory: Path
    is_done: bool
    step: int
    student: Path | None
    report: Path | None
    data: ReportData


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    view: View | None = None,
    origins: Mapping[str, str] | None = None,
) -> RunResult:
    """Run `config` to its end, or go on with the run in its directory (`resume`).

    Callable from a notebook too. `view` shows progress (default: a panel on a terminal, else log
    lines); `origins` says where config values came from, for the record.

    Raises:
        InputError: config, data, models or directory cannot be used (nothing was started).
        RunError: the run could not go on; what was done is kept, `resume` goes on from it.
    """
    prepared = prepare(config)
    layout = open_directory(config, prepared, resume=resume, origins=origins or {})
    ending = _outside_loops(
        lambda: _session(config, prepared, layout, view if view is not None else make_view())
    )
    return _conclude(config, layout, ending)


async def _drive(
    config: RunConfig, prepared: Prepared, layout: RunLayout, ledger: Ledger, monitor: Monitor
) -> Ending:
    """Start the workers, let the controller run, end them whatever happens."""
    runtime = build_runtime(config.runtime, layout.logs)
    try:
        dispatcher = Dispatcher(
            config,
            spawn_crew(config, runtime, layout.root),
            ledger,
            prompts=prepared.prompts,
            heldout=prepared.heldout,
            on_start=monitor.started,
            on_span=monitor.span,
            on_message=monitor.message,
        )
        controller = Controller(
            Plan(config, num_ranks=config.train.ranks),
            dispatcher,
            ledger,
            layout,
            monitor,
            keep_checkpoints=config.checkpoint.keep,
        )
        has_heldout = bool(prepared.heldout) and num_scorers(config) > 0
        with _signals(controller):
            return await controller.run(len(prepared.prompts), has_heldout=has_heldout)
    finally:
        await runtime.close()


def _session(config: RunConfig, prepared: Prepared, layout: RunLayout, view: View) -> Ending:
    """Hold the run's ledger and drive the run; the view is closed whatever happens."""
    try:
        with Ledger(layout.ledger_db) as ledger:
            layout.sweep()
            trackers = build_trackers(config.observe.trackers, layout.root / "trackers")
            teachers = [prompt.teacher for prompt in prepared.prompts] if config.teachers else []
            monitor = Monitor(config, layout, view, trackers, teachers)
            for note in prepared.notes:
                monitor.message(note)
            try:
                return asyncio.run(_drive(config, prepared, layout, ledger, monitor))
            except asyncio.CancelledError:
                raise RunError(f"stopped at once: go on with --resume ({layout.root})") from None
            finally:
                monitor.close()
    finally:
        view.close()


def _outside_loops(work: Callable[[], T]) -> T:
    """Do `work` here, or in a thread of its own where an event loop is running (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def _signals(controller: Controller) -> Iterator[None]:
    """The first SIGINT or SIGTERM drains and saves, the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, main, caught = asyncio.get_running_loop(), asyncio.current_task(), False

    def stop() -> None:
        nonlocal caught
        if caught and main is not None:
            main.cancel()
        caught = True
        controller.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _conclude(config: RunConfig, layout: RunLayout, ending: Ending) -> RunResult:
    data = tell(layout, config)
    return RunResult(
        directory=layout.root,
        is_done=ending.is_done,
        step=ending.step,
        student=layout.student if ending.is_done else None,
        report=write_report(config, layout, data) if config.observe.report else None,
        data=data,
    )


def write_report(config: RunConfig, layout: RunLayout, data: ReportData) -> Path:
    """Write `report.html`, and `trace.json` for Perfetto; returns the report's path."""
    if config.observe.trace:
        with suppress(FileNotFoundError):
            export_perfetto(layout.trace_jsonl, layout.trace_json)
    page = build_report(data).encode()
    write_atomic(layout.report_html, lambda file: file.write(page))
    return layout.report_html
