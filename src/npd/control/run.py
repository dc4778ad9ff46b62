"""One run from config to student: check the inputs, open the run, start the workers, drive, report.

`_drive` is the wiring, in the order of README's diagram. Each part has a module of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from npd.config import RunConfig
from npd.config.load import dump_config
from npd.config.sources import SMOKE, resume_command
from npd.control.controller import Controller, Ending
from npd.control.devices.defaults import check_servers, chosen, with_defaults
from npd.control.devices.placement import (
    WorkerSet,
    start_generators,
    start_scorers,
    start_trainer,
)
from npd.control.dispatcher import Dispatcher
from npd.control.interrupt import Interrupt, outside_loops, stop_on_signals
from npd.control.monitor import Monitor
from npd.control.preflight import Start, check_cluster, prepare
from npd.control.report_data import RunResult, summarize, write_report
from npd.control.resume import finished_at
from npd.control.resume_checks import as_recorded, recorded_models
from npd.control.run_directory import (
    OpenRun,
    clear_smoke,
    has_report,
    has_student,
    missing_folder,
    open_directory,
    remove_unless_started,
)
from npd.control.run_record import clock_of
from npd.data.inputs import RunInputs
from npd.errors import InputError, RunError
from npd.observe.live import View, make_view
from npd.observe.trackers import Callback, build_trackers
from npd.remote.shared_folder import (
    check_handshake,
    open_artifacts,
    release_shared,
    run_id,
    with_handshake,
)
from npd.runtime import Runtime, build_runtime
from npd.schedule.plan import Plan
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger

_TICK_SECONDS = 1.0


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    view: View | None = None,
    origins: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Run `config` to its end, or resume the run in its directory (`resume`).

    Works in a notebook too. `view` shows progress (default: a panel on a terminal, else plain
    lines). `origins` says where config values came from, for the record. `notes` are shown first.

    Raises:
        InputError: config, data, models or directory cannot be used. The directory of a new run is
            removed, unless a sample was generated, scored or trained on.
        RunError: the run cannot continue. Finished work is kept; `resume=True` continues from it.
    """
    origins, asked = origins or {}, config
    config = with_defaults(as_recorded(config) if resume else config)
    if SMOKE in origins.values():
        clear_smoke(config)
    clock = clock_of(config) if resume else None
    inputs = prepare(config, clock=clock, start=Start(resume, origins))
    check_servers(config)
    config = config.sized(len(inputs.prompts))
    inputs = replace(inputs, notes=(*notes, *chosen(asked, config), *inputs.notes))
    go_on = resume_command(dump_config(asked), origins)
    missing = missing_folder(config.directory)
    layout = open_directory(config, inputs, resume=resume, origins=origins)
    last_step = finished_at(config, layout) if resume else None
    if last_step is not None and (last_step == 0 or has_student(layout)):
        return _conclude(config, layout, Ending(last_step, is_done=True), go_on, was_done=True)
    if last_step is not None:
        note = f"{layout.student} is damaged: writing it again"
        inputs = replace(inputs, notes=(*inputs.notes, note))
    if config.runtime.kind == "ray":
        check_cluster(config)
    for callback in callbacks:
        callback.on_start(layout.root)
    interrupt = Interrupt()

    def session() -> Ending:
        with _open_run(config, inputs, layout, view or make_view(), callbacks, go_on) as run:
            return asyncio.run(_ticking(_drive(run, interrupt), run.monitor))

    mark = run_id(layout)
    try:
        ending = outside_loops(session, interrupt)
    except InputError as error:
        if not resume and remove_unless_started(layout, missing, error):
            release_shared(config, layout, mark)
        raise
    result = _conclude(config, layout, ending, go_on)
    for callback in callbacks:
        callback.on_end(result.step, is_done=result.is_done)
    return result


async def _drive(run: OpenRun, interrupt: Interrupt) -> Ending:
    """Start the workers; the loop runs them to the end of the run.

    prompts -> generate -> score -> filter, pack (the plan) -> train -> student
    """
    async with _open_runtime(run) as runtime:
        workers = WorkerSet(
            generators=start_generators(run, runtime),
            scorers=start_scorers(run, runtime),
            trainer=start_trainer(run, runtime),
        )
        plan = Plan(run.config)  # decides: what is next, which samples, in which order
        dispatcher = Dispatcher(run, workers)  # calls a worker for each decision, and retries
        controller = Controller(run, plan, dispatcher)  # the loop: records events and decisions
        with stop_on_signals(controller, interrupt):
            await check_handshake(runtime)
            return await controller.run()


async def _ticking(work: Coroutine[Any, Any, Ending], monitor: Monitor) -> Ending:
    """Do `work`; the view is updated every second meanwhile."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            monitor.tick()

    ticking = asyncio.create_task(tick())
    try:
        return await work
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)


@asynccontextmanager
async def _open_runtime(run: OpenRun) -> AsyncIterator[Runtime]:
    """The runtime of the run; on exit it is closed, and its workers with it."""
    runtime = build_runtime(run.config.runtime, run.layout.logs)
    runtime = with_handshake(runtime, run.config, run.layout)
    try:
        yield runtime
    finally:
        await runtime.close()


@contextmanager
def _open_run(
    config: RunConfig,
    inputs: RunInputs,
    layout: RunLayout,
    view: View,
    callbacks: Sequence[Callback],
    go_on: str,
) -> Iterator[OpenRun]:
    """Open the ledger, the monitor and the store of artifacts; on exit close them and the view."""
    try:
        with Ledger(layout.ledger_db) as ledger:
            layout.remove_temporary()
            trackers = build_trackers(config.observe.trackers, layout.root / "trackers")
            teachers = [prompt.teacher for prompt in inputs.prompts] if config.teachers else []
            monitor = Monitor(config, layout, view, trackers, teachers, callbacks)
            try:
                for note in (*inputs.notes, *inputs.remarks):
                    monitor.message(note)
                artifacts = open_artifacts(config, layout, ledger)
                models = recorded_models(config, layout)
                yield OpenRun(config, inputs, layout, ledger, monitor, artifacts, models)
            except asyncio.CancelledError:
                raise RunError(f"stopped without saving: resume with {go_on}") from None
            except KeyboardInterrupt:  # before there was a controller to drain and save
                monitor.message(f"interrupted before the work began: resume with {go_on}")
                raise
            finally:
                monitor.close()
                # Remove half-written files of killed workers. On a full disk this may fail too;
                # the next resume does it again.
                with suppress(RunError):
                    layout.remove_temporary()
    finally:
        view.close()


def _conclude(
    config: RunConfig, layout: RunLayout, ending: Ending, go_on: str, *, was_done: bool = False
) -> RunResult:
    """Summarise the run and write its report, unless a finished run has one already."""
    data = summarize(layout, config, tokenizer=config.student)
    report = layout.report_html if was_done and has_report(layout) else None
    if report is None and config.observe.report:
        report = write_report(config, layout, data)
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
