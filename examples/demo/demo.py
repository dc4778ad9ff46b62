"""The demo: SmolLM2-135M teaches a copy of itself that lost half of its layers.

Run by `make demo`. Imports the teacher from its PyPI wheel, prunes it to a student, fine-tunes the
student on teacher text (`warm.yaml`), distils it on its own text (`npd.yaml`), and prints what each
stage brought on prompts never trained on. Starts from nothing each time but keeps the two models.
"""

import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import npd
from npd.__main__ import outcome
from npd.prepare import import_gguf, prune_depth, smollm2_gguf
from npd.settings import load_config
from npd.wording import counted

HERE = Path(__file__).parent
MODELS, RUNS = Path("models"), Path("runs/demo")
# Half of the 30 layers, found by leaving out, one at a time, the layer whose absence moves the
# model's outputs least (KL 2.7 to the full model; 13 layers spread evenly have 10).
LAYERS = (0, 1, 2, 8, 9, 10, 11, 12, 21, 22, 23, 24, 27, 28, 29)
MEASURES = (
    ("kl", "held-out KL to the teacher", "{:.3f}"),
    ("agreement", "same top token as the teacher", "{:.1%}"),
    ("exact_match", "names what it is asked about", "{:.1%}"),
)


def main() -> None:
    """Make the models, run both stages, print the table."""
    started = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    teacher, pruned = prepare_models()
    warm = stage("2/3 warm start on teacher text", "warm", pruned, teacher)
    near = stage("3/3 near-policy distillation", "npd", warm.student, teacher)
    show(warm.data.evals, near.data.evals, time.monotonic() - started)
    print(f"student   {near.student}")
    print(f"report    {near.report}   (open it in a browser)")


def prepare_models() -> tuple[Path, Path]:
    """Teacher and pruned student as Hugging Face directories, made once."""
    say("1/3 models: import SmolLM2-135M, leave out half of its layers")
    teacher, pruned = MODELS / "smollm2-135m", MODELS / "smollm2-pruned"
    if not teacher.exists():
        import_gguf(smollm2_gguf(), teacher)
    if not pruned.exists():
        prune_depth(teacher, pruned, LAYERS)
    return teacher, pruned


def stage(title: str, name: str, student: Path, teacher: Path) -> npd.RunResult:
    """One run of the demo, configured by the YAML file of that name."""
    say(title)
    values = {
        "student": student,
        "teacher": teacher,
        "data.train": HERE / "prompts.jsonl",
        "run_dir": RUNS / name,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    overrides += (argument for argument in sys.argv[1:] if argument != "--debug")
    settings = load_config(HERE / f"{name}.yaml", overrides)
    result = npd.run(settings.config, origins=settings.origins)
    if not result.is_done:
        say(f"interrupted: the next `make demo` starts {RUNS} anew")
        raise KeyboardInterrupt
    return result


def show(warm: list, near: list, seconds: float) -> None:
    """The table: the student as pruned, after the warm start, after NPD."""
    print(f"\n{'':32}{'pruned':>10}{'warm start':>12}{'NPD':>10}")
    for name, label, form in MEASURES:
        cells = [form.format(e[name]) for e in (warm[0], near[0], near[-1])]
        print(f"{label:32}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}")
    held_out = counted(near[-1]["num_prompts"], "held-out prompt")
    print(f"\nmeasured on {held_out}; whole demo {seconds / 60:.1f} min on {os.cpu_count()} cores")


def say(text: str) -> None:
    """A line of the demo itself."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(outcome(main, debug="--debug" in sys.argv))
