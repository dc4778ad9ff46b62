"""The command line: each command parses its arguments, calls one function and prints the result.

Heavy imports happen inside the commands. Every command has an equivalent in the library. Errors are
handled in `npd.__main__`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from npd.terminal import say, say_json

if TYPE_CHECKING:
    from npd.stages import Made


class _Commands(TyperGroup):
    """The commands. A hidden command runs, but is not listed or suggested for a mistyped name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._hidden = {name: found for name, found in self.commands.items() if found.hidden}
        for name in self._hidden:
            del self.commands[name]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        return self._hidden.get(cmd_name) or super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Commands,
    help="Near-Policy Distillation: train a small language model on its own text with a large "
    "teacher, at the cost of fine-tuning.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="All settings and their values: npd config npd --set student=DIR --set teacher=DIR. "
    "Every command accepts --debug, which shows the traceback of an error. "
    "Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted.",
)

Config = Annotated[
    str,
    typer.Argument(
        help="YAML file, or a preset: npd, npd_adaptive, on_policy, offline_kd, seqkd, sft.",
        metavar="CONFIG",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set a value, e.g. train.lr=1e-5; repeatable.", metavar="KEY=VALUE"),
]
OutFile = Annotated[Path, typer.Option("--out", help="Arrow file to write; must not exist.")]
OutModel = Annotated[Path, typer.Option("--out", help="Model directory to write; must not exist.")]
RunDir = Annotated[Path, typer.Argument(help="Run directory, e.g. runs/npd.", metavar="RUN")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from npd import __version__

        say(f"npd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print npd's version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None: ...


@app.command()
def run(
    config: Config,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that stopped.")] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Test the config: run every stage in four steps, on a few short samples, in "
            "<name>-smoke.",
        ),
    ] = False,
) -> None:
    """Distil: run the whole loop, from prompts to a student."""
    from npd.api import run as run_config
    from npd.config.load import load_config
    from npd.printing import result_lines, smoke_line
    from npd.store.layout import RunLayout

    settings = load_config(config, sets or ())
    result = run_config(settings, resume=resume, smoke=smoke)
    if result.was_done:
        say(f"{result.directory} is already finished: nothing was trained")
    for line in result_lines(result.data, RunLayout(result.directory), result.go_on):
        say(line)
    if not result.is_done:
        raise typer.Exit(130)
    if smoke:
        say(smoke_line(settings))


@app.command()
def show(
    run: RunDir,
    report: Annotated[bool, typer.Option("--report", help="Rewrite report.html.")] = False,
) -> None:
    """Show a run: its quality, speed and sample outcomes."""
    from npd.control import report_data
    from npd.control.run_record import load_run
    from npd.printing import result_lines
    from npd.store.layout import RunLayout

    layout = RunLayout(run)
    config = load_run(layout)
    tokenizer = report_data.tokenizer_here(layout, config) if report else None
    data = report_data.summarize(layout, config, tokenizer=tokenizer)
    if report:
        report_data.write_report(config, layout, data)
    for line in result_lines(data, layout):
        say(line)


@app.command("config")
def show_config(config: Config, sets: Sets = None) -> None:
    """Print every setting with its value and the origin of the value."""
    from npd.config.load import load_config
    from npd.printing import config_lines

    for line in config_lines(load_config(config, sets or ())):
        say(line)


@app.command()
def doctor(
    config: Config,
    sets: Sets = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", help="Forecast the memory of a machine that is not here, such as 8x80GB."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check a run before it starts: models, data, memory, servers."""
    from npd.doctor import examine, summary, to_json

    found = []
    for check in examine(config, sets or (), gpus=gpus):
        found.append(check)
        if not as_json:
            say(str(check))
    if as_json:
        say_json(to_json(found))
    else:
        say("")
        say(summary(found))
    if any(check.status == "FAIL" for check in found):
        raise typer.Exit(2)


@app.command()
def generate(
    config: Config,
    out: OutFile,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot",
            help="Model directory that generates; default: the model of generate.source.",
        ),
    ] = None,
    sets: Sets = None,
) -> None:
    """Run one stage: generate a response to each training prompt."""
    from npd.config.load import load_config
    from npd.stages import generate as stage

    settings = load_config(config, sets or ())
    made = stage(settings.config, out, snapshot=snapshot, notify=say)
    _print_made(made, "rollout", out)


@app.command()
def score(
    config: Config,
    rollouts: Annotated[
        Path, typer.Option("--rollouts", help="Arrow file that `npd generate` wrote.")
    ],
    out: OutFile,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot", help="Model directory that generated them; default: the student."
        ),
    ] = None,
    sets: Sets = None,
) -> None:
    """Run one stage: add the teacher's log-probs to the responses."""
    from npd.config.load import load_config
    from npd.stages import score as stage

    settings = load_config(config, sets or ())
    made = stage(settings.config, rollouts, out, snapshot=snapshot, notify=say)
    _print_made(made, "scored rollout", out)


def _print_made(made: Made, what: str, out: Path) -> None:
    from npd.text import counted

    if made.failed:
        total = made.num_records + len(made.failed)
        failed = f"{len(made.failed)} of {counted(total, 'sample')} failed"
        say(f"{failed}: {made.failed[0].reason}")
    say(f"{counted(made.num_records, what)} in {out}")


@app.command()
def train(
    config: Config,
    data: Annotated[
        Path,
        typer.Option("--data", help="Arrow file that `npd score` wrote (for SFT: `npd generate`)."),
    ],
    out: OutModel,
    sets: Sets = None,
) -> None:
    """Run one stage: filter the samples and train on them."""
    from npd.config.load import load_config
    from npd.stages import train as stage

    for line in stage(load_config(config, sets or ()).config, data, out):
        say(line)


@app.command(
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def prepare() -> None:
    """Name the script that replaces this command."""
    from npd.errors import InputError

    raise InputError(
        "npd prepare was removed: pip install 'npd[gguf]', and in npd's repository run "
        "python examples/demo/prepare.py with the same options"
    )


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run directory, e.g. runs/npd, or an adapter (a snapshot with train.lora).",
            metavar="RUN",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Model directory to write; must not exist.", metavar="OUT")
    ],
    trust: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code that comes with the model, to check it."
        ),
    ] = False,
) -> None:
    """Check a run's student and copy it to a Transformers directory."""
    from npd.control.run_directory import export_source
    from npd.export import export_model

    made = export_model(export_source(run), out, trust_remote_code=trust)
    say(f"model directory {made}")


@app.command()
def version() -> None:
    """Print the versions of npd and of the libraries it uses."""
    from npd.environment import versions

    say_json(versions())
