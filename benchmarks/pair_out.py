"""What `real.py` and `peers_run.py` share but for the pair: command line, cells on disk, the page.

Promises: no path of the machine gets onto a page.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pair
from common import machine, number, versions
from npd.engines.capabilities import HELDOUT_TOP_K
from npd.errors import DataError, InputError
from tables import interval

S = TypeVar("S")
OWN_KL = f"KL on own text (top {HELDOUT_TOP_K} and the rest: a lower bound)"
BOUND = (
    f"KLs are over the teacher's top {HELDOUT_TOP_K} ids and one bucket for the rest: lower bounds."
)
FEWER = "Rows with fewer seeds: what there was time for."


def make_parser(doc: str | None, *, needs_data: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=needs_data, help="JSONL file of questions")
    parser.add_argument("--column", default="question", help="its column that holds them")
    parser.add_argument("--data-name", help="what the page calls the data; default: FILE's name")
    parser.add_argument("--models", type=Path, help="where the two models are kept")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the page and its JSON")
    parser.add_argument(
        "--set-pair", nargs="+", default=[], metavar="NAME=VALUE", help="of pair.py's Setting"
    )
    return parser


@contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """Where to run."""
    if args.folder is not None:
        yield args.folder
        return
    with tempfile.TemporaryDirectory(prefix="npd-pair-") as directory:
        yield Path(directory)


def open_pair(args: argparse.Namespace, folder: Path) -> pair.Pair:
    """The pair that the command line names; its models are made if they are not there."""
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: give at least 1")
    if args.data is None:
        raise InputError("--data: name a JSONL file with a question a line, or a task by --task")
    if not args.data.is_file():
        raise DataError(
            f"--data {args.data}: no such file: name a JSONL file with a question a line, such as "
            "GSM8K's train.jsonl"
        )
    made = pair.models(args.models or folder / "models")
    return pair.RealPair(
        changed(pair.Setting(), args.set_pair), folder, args.data, args.column, made
    )


def changed(setting: S, items: Sequence[str]) -> S:
    """`setting` with `NAME=VALUE` items set, each of the kind that its default is of."""
    values: dict[str, Any] = {}
    for item in items:
        name, _, value = item.partition("=")
        known = vars(setting)
        if name not in known:
            raise InputError(f"no such setting: {name} (there are {', '.join(known)})")
        kind = type(known[name])
        try:
            values[name] = kind(value)
        except ValueError:
            kinds = {int: "a whole number", float: "a number"}
            raise InputError(f"{item}: {name} is {kinds[kind]}, such as {known[name]}") from None
    return replace(setting, **values)  # type: ignore[type-var]


def finished(home: Path) -> list[dict[str, Any]]:
    """The cells in `home`, seed by seed."""
    cells = [json.loads(path.read_text()) for path in home.glob("*/cell.json")]
    return sorted(cells, key=lambda found: int(found["seed"]))


def own_text(made: pair.Pair, home: Path) -> dict[str, Any]:
    """What the student kept in `home` is on its own text; measured once."""
    from judging import on_own_text

    found = pair.cell(home / "own", lambda: on_own_text(made, home / "student"), dict)
    return {name: value for name, value in found.items() if name.startswith("own_")}


def about(
    program: str,
    args: argparse.Namespace,
    cells: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What a page says of how it was made: no path of this machine is in it.

    `chosen`: of an option that takes several names, those whose rows are on the page.
    """
    seeds = 1 + max(int(found["seed"]) for found in cells)
    named = {} if args.data_name is None else {"data-name": [args.data_name]}
    sizes = {"set": args.set, "set-pair": args.set_pair, "set-task": getattr(args, "set_task", [])}
    options = {**named, **chosen, **sizes}
    extra = "".join(f" --{name} {shlex.join(items)}" for name, items in options.items() if items)
    task = getattr(args, "task", None)
    what = f"--task {task}" if task else "--data FILE"
    return {
        "command": f"python benchmarks/{program} {what} --seeds {seeds}{extra}",
        "data": f"task {task}" if task else args.data_name or args.data.name,
        "commits": sorted({found["commit"] for found in cells}),
        "machine": machine(),
        "versions": versions(),
    }


def publish(out: Path | None, name: str, text: str, record: Mapping[str, Any]) -> None:
    """Print the page; write it and its figures to `out` if it is given."""
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / f"{name}.md").write_text(text)


def foot(about: Mapping[str, Any], setting: Mapping[str, Any], loads: Sequence[float]) -> list[str]:
    """The lines at the end of a page: how it was made, where, with what."""
    host = about["machine"]
    gpu = f"{host['gpu']}, " if "gpu" in host else ""
    return [
        f"- data: {about['data']}",
        f"- setting: `{' '.join(f'{name}={value}' for name, value in setting.items())}`",
        f"- command: `{about['command']}`",
        f"- commits of the runs: {', '.join(about['commits'])}",
        f"- machine: {gpu}{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; load "
        f"average {min(loads):.1f} to {max(loads):.1f} during the runs; one thread",
        f"- versions: {', '.join(f'{name} {found}' for name, found in about['versions'].items())}",
    ]


def spread(values: Sequence[float], digits: int | None = None, *, signed: bool = False) -> str:
    """Mean ± half-width of its 95 % t-interval; three or four figures, or so many `digits`."""
    if not values:
        return ""
    middle, half = interval(values)
    shown = number(middle) if digits is None else f"{middle:.{digits}f}"
    shown = f"+{shown}" if signed and middle >= 0 else shown
    if math.isnan(half):
        return shown
    return f"{shown} ± {number(half) if digits is None else f'{half:.{digits}f}'}"
