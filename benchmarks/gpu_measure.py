"""Eight minutes on one GPU: where the time of training, scoring and decoding goes.

The most telling section comes first. Each stands alone, is skipped when its minutes are gone, and
writes its lines to `measured.jsonl` at once:

- `rates`: matrix products and copies, which show whether the GPU is itself;
- `train`: a step with either loss, some chunks, rows of 8k to 32k tokens, eager and compiled;
- `loss`: chunks, the head's gradient added up in float32 and as it was, Liger;
- `score`: rows and head chunks, logits read once in float32 and as it was, compiled layers;
- `decode`: a step at 32 to 256 rows, and transformers' continuous batching;
- `exact`: attention beside float32, equal steps, the cases of `tests/triton_cases.py`;
- `neighbours`: a step while another process decodes;
- `disk`: a checkpoint, a snapshot and its check.

    python benchmarks/gpu_measure.py --minutes 7.5 --out measured
    python benchmarks/gpu_measure.py --quick --device cpu --only rates loss

Models have the shape of Qwen2.5-1.5B and random weights, a second teacher that of the 7B. Times are
the least of a few. A `divisor` above 1 says that the memory was short and rows were cut. The lines
marked CUDA never ran; `--quick --device cpu` shows that the others do. npd need not be installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from common import ROOT, free

# About how many seconds each section takes on an H200 (an estimate).
SECTIONS = {
    "rates": 5,
    "train": 150,
    "loss": 30,
    "score": 90,
    "decode": 70,
    "exact": 45,
    "neighbours": 45,
    "disk": 45,
}
# A section starts with this share of its time left: its first lines tell the most.
ENOUGH = 0.7
# Models are in memory where they fit: the 1.5B's and the 7B's weights in bfloat16, and samples.
MEMORY, ROOM_GIB = Path("/dev/shm"), {True: 1, False: 24}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="from the first section on")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for measured.jsonl")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small: only to see them run")
    names = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--decode-loop", type=float, help=argparse.SUPPRESS)  # for `neighbours`
    return parser.parse_args()


def prepare(device: str) -> None:
    """What torch, triton and the cases in tests/ read when they are imported."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ |= {"FUSED_DEVICE": device, "TRITON_INTERPRET": "0"}
    sys.path.insert(0, str(ROOT / "src"))


def parent_of_room(*, is_quick: bool) -> Path | None:
    """Where the folder for models goes; None is the system's own place."""
    needed = ROOM_GIB[is_quick] * 2**30
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed else None


def measure(meter: Any, name: str, left: float) -> bool:
    """One section with `left` seconds; False if it failed."""
    import gpu_sections

    if left < ENOUGH * SECTIONS[name]:
        meter.say(name, skipped=round(left))
        return True
    try:
        getattr(gpu_sections, name)(meter)
    except Exception as error:  # noqa: BLE001 the others go on
        traceback.print_exc()
        meter.say(name, error=f"{type(error).__name__}: {error}"[:400])
        return False
    finally:
        free()
    return True


def main() -> int:
    """The sections in order; 1 if one failed."""
    args = parse_args()
    prepare(args.device)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use here (--device cpu --quick shows that it runs)")
    import gpu_sections
    from gpu_meter import Meter

    started, parent = time.monotonic(), parent_of_room(is_quick=args.quick)
    lines = args.out / "measured.jsonl"
    if args.decode_loop is not None:  # ended from outside, so it makes no folder
        meter = Meter(args.device, args.quick, lines, args.out, started)
        gpu_sections.decode_for(meter, args.decode_loop)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as room:
        meter = Meter(args.device, args.quick, lines, Path(room), started)
        ends = started + 60 * args.minutes
        chosen = [name for name in SECTIONS if name in args.only]
        worked = [measure(meter, name, ends - time.monotonic()) for name in chosen]
    return int(not all(worked))


if __name__ == "__main__":
    sys.exit(main())
