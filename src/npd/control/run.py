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
from npd.control.finished import finished_at
from npd.control.monitor import Monitor
from npd.control.opening import open_directory
from npd.control.plan import Plan
from npd.control.preparation import Prepared, prepare
from npd.control.sharing import Gathering, check_place, gathered, open_place
from npd.control.story import tell
from npd.errors import RunError
from npd.observe.live import View, make_view
from npd.observe.report import ReportData, build_report
from npd.observe.trace import export_perfetto
from npd.observe.trackers import build_trackers
from npd.resuming import resume_command
from npd.runtime import build_runtime
from npd.settings import dump_config
from npd.store.files import write_atomic
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left. `student` is None when it was interrupted; then `resume` goes on.

    `go_on`: the command that does so. `was_done`: it had finished before, and nothing was done.
    """

    directory: Path
    is_done: bool
    step: int
    student: Path | None
    report: Path | None
    data: ReportData
    go_on: str
    was_done: bool = False


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
    go_on = resume_command(dump_config(config), origins or {})
    check_place(config, resume=resume)
    layout = open_directory(config, prepared, resume=resume, origins=origins or {})
    last_step = finished_at(config, layout) if resume else None
    if last_step is not None:
        return _conclude(config, layout, Ending(last_step, is_done=True), go_on, was_done=True)
    ending = _outside_loops(
        lambda: _session(config, prepared, layout, view if view is not None else make_view(), go_on)
    )
    return _conclude(config, layout, ending, go_on)


async def _drive(
    config: RunConfig, prepared: Prepared, layout: RunLayout, ledger: Ledger, monitor: Monitor
) -> Ending:
    """Start the workers, let the controller run, end them whatever happens."""
    runtime = gathered(build_runtime(config.runtime, layout.logs), config, layout)
    try:
        place = open_place(config, layout, ledger)
        dispatcher = Dispatcher(
            config,
            spawn_crew(config, runtime, layout.root),
            ledger,
            prompts=prepared.prompts,
            heldout=prepared.heldout,
            on_start=monitor.started,
            on_span=monitor.span,
            on_message=monitor.message,
            place=place,
        )
        controller = Controller(
            Plan(config, num_ranks=config.train.ranks),
            dispatcher,
            ledger,
            layout,
            monitor,
            keep_checkpoints=config.checkpoint.keep,
            place=place,
        )
        has_heldout = bool(prepared.heldout) and num_scorers(config) > 0
        with _signals(controller):
            if isinstance(runtime, Gathering):
                await runtime.prove()
            return await controller.run(len(prepared.prompts), has_heldout=has_heldout)
    finally:
        await runtime.close()


def _session(
    config: RunConfig, prepared: Prepared, layout: RunLayout, view: View, go_on: str
) -> Ending:
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
                raise RunError(f"stopped at once: go on with {go_on}") from None
            finally:
                monitor.close()
                # Workers have ended: what those that were killed left half written goes too, or
                # when the run is resumed, if the disk is what ended it.
                with suppress(RunError):
                    layout.sweep()
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


def _conclude(
    config: RunConfig, layout: RunLayout, ending: Ending, go_on: str, *, was_done: bool = False
) -> RunResult:
    """What there is now; of a run that was done before, nothing is written anew."""
    data = tell(layout, config)
    if was_done:
        report = layout.report_html if layout.report_html.exists() else None
    else:
        report = write_report(config, layout, data) if config.observe.report else None
    return RunResult(
        directory=layout.root,
        is_done=ending.is_done,
        step=ending.step,
        student=layout.student if ending.is_done else None,
        report=report,
        data=data,
        go_on=go_on,
        was_done=was_done,
    )


def write_report(config: RunConfig, layout: RunLayout, data: ReportData) -> Path:
    """Write `report.html`, and `trace.json` for Perfetto; returns the report's path."""
    if config.observe.trace:
        with suppress(FileNotFoundError):
            export_perfetto(layout.trace_jsonl, layout.trace_json)
    page = build_report(data).encode()
    write_atomic(layout.report_html, lambda file: file.write(page))
    return layout.report_html
