"""What `npd` says of wrong input and of runs that cannot go on: one line, and nothing lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from tiny_model import make_model, make_tokenizer


@pytest.fixture
def broken(shell, tmp_path):
    """A shell whose models' weights are cut short: whatever is found is found without loading."""
    for role in ("student", "teacher"):
        copy = tmp_path / role
        shutil.copytree(getattr(shell, role), copy)
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        setattr(shell, role, copy)
    shell.write()
    return shell


@dataclass
class Case:
    """Something wrong with the input, and what the one line must name: the place and the remedy."""

    says: list[str]
    sections: dict = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    rows: list | None = None
    text: str | None = None


def long(count: int) -> str:
    return "x " * count


CASES = {
    "data file missing": Case(
        ["data file nope.jsonl does not exist", "check the path"], sets=["data.train=nope.jsonl"]
    ),
    "data not set": Case(["data.train is not set", "name a"], sets=["data.train=null"]),
    "data empty": Case(["prompts.jsonl has no prompts", "it is empty"], text=""),
    "data only blank lines": Case(["prompts.jsonl has no prompts", "it is empty"], text="\n \n"),
    "data of another kind": Case(
        ["prompts.txt", "convert"], sets=["data.train=prompts.txt", "name=x"]
    ),
    "data not JSON": Case(["prompts.jsonl:2", "not JSON", "one JSON object per line"],
                          text='{"prompt": "a"}\n{"prompt": \n'),
    "wrong column": Case(
        ["prompts.jsonl:1", "problem, response", "set data.columns", "{prompt: problem}"],
        rows=[{"problem": "who?", "response": "me"}] * 9,
    ),
    "renamed to a column that is not there": Case(
        ["prompts.jsonl:1", "no column 'promt'", "did you mean 'prompt'?", "data.columns"],
        sets=["data.columns={prompt: promt}"],
    ),
    "rename of an unknown column": Case(
        ["data.columns", "'promt'", "did you mean prompt?"], sets=["data.columns={promt: prompt}"]
    ),
    "empty prompt": Case(
        ["prompts.jsonl:2", "prompt is empty", "data.on_bad_record: drop"],
        rows=[{"prompt": "a?"}, {"prompt": "  "}, *[{"prompt": f"{i}?"} for i in range(9)]],
    ),
    "prompt too long": Case(
        ["1 of 5 prompts", "data.max_prompt_tokens (96)", "raise data.max_prompt_tokens",
         "data.on_long_prompt: drop"],
        rows=[{"prompt": long(200)}, *[{"prompt": f"{i}?"} for i in range(8)]],
    ),
    "every prompt too long and dropped": Case(
        ["no training prompt is left", "data.on_long_prompt", "data.max_prompt_tokens"],
        sets=["data.on_long_prompt=drop"], rows=[{"prompt": long(200 + i)} for i in range(9)],
    ),
    "too few prompts to hold out": Case(
        ["has 3 prompts", "lower data.heldout_size"], rows=[{"prompt": f"{i}?"} for i in range(3)]
    ),
    "no completions to learn from": Case(
        ["generate.source dataset", "add a `completion` column"],
        rows=[{"prompt": f"{i}?"} for i in range(9)],
        sets=["generate.source=dataset", "schedule.refresh=never"],
    ),
    "unknown key in the file": Case(
        ["run.yaml:", "unknown key train.learnig_rate", "did you mean train.lr?"],
        sections={"train": {"learnig_rate": 1}},
    ),
    "mistyped key in the file": Case(
        ["run.yaml:", "unknown key generate.max_new_token",
         "did you mean generate.max_new_tokens?"],
        sections={"generate": {"max_new_token": 1}},
    ),
    "mistyped section": Case(
        ["run.yaml:", "unknown key trian.lr", "did you mean train.lr?"],
        sections={"trian": {"lr": 1}},
    ),
    "unknown key of --set": Case(
        ["--set train.lrr=1", "did you mean train.lr?"], sets=["train.lrr=1"]
    ),
    "two unknown keys": Case(
        ["did you mean train.lr?", "did you mean score.top_k?"], sets=["train.lrr=1", "top_k=3"]
    ),
    "--set without a value": Case(["--set train.lr", "write it as KEY=VALUE"], sets=["train.lr"]),
    "value out of range": Case(
        ["--set train.lr=-1", "train.lr must be greater than 0"], sets=["train.lr=-1"]
    ),
    "value of another kind": Case(
        ["--set loss.target=top", "'topk', 'renorm', 'tail'"], sets=["loss.target=top"]
    ),
    "broken YAML": Case(["run.yaml:2", "not YAML", "check indentation"], sections=None),
    "several impossible combinations, all named": Case(
        ["set exactly one of schedule.epochs and schedule.steps",
         "train.min_lr (1.0) is above train.lr", "lower bound is above its upper bound",
         "train.row_tokens (50) must hold the longest sample"],
        sets=["schedule.steps=3", "schedule.epochs=4", "train.min_lr=1", "filter.low=2",
              "train.row_tokens=50"],
    ),
    "sampled target with a temperature": Case(
        ["loss.target sampled", "loss.temperature (2)", "set loss.temperature: 1"],
        sets=["loss.target=sampled", "loss.temperature=2"],
    ),
    "sampled target in reverse": Case(
        ["loss.target sampled", "set loss.divergence: forward"],
        sets=["loss.target=sampled", "loss.divergence=reverse"],
    ),
    "no teacher": Case(["needs a teacher: set `teacher`"], sets=["teacher=null"]),
    "student not there": Case(
        ["no model directory at models/none/x", "correct `student`"], sets=["student=models/none/x"]
    ),
    "teacher not there, one slash": Case(
        ["no model directory at student/none", "correct `teacher`"], sets=["teacher=student/none"]
    ),
    "student not a model": Case(
        ["no usable config.json", "give a Hugging Face model directory"], sets=["student=."]
    ),
    "context too short": Case(
        ["context is 512", "generate.max_new_tokens", "lower them to 512 in sum"],
        sets=["generate.max_new_tokens=600", "train.row_tokens=2048", "score.row_tokens=2048"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_with_a_remedy_before_any_model_loads(name, broken):
    case = CASES[name]
    if case.rows is not None:
        case.text = "".join(json.dumps(row) + "\n" for row in case.rows)
    if case.text is not None:
        (broken.folder / "prompts.jsonl").write_text(case.text)
    (broken.folder / "prompts.txt").write_text("prompt\na\n")
    if case.sections is None:
        (broken.folder / "run.yaml").write_text("student: x\nteacher: a: b\n")
    else:
        broken.write(**case.sections)
    sets = [part for one in case.sets for part in ([one] if one[0] == "-" else ["--set", one])]
    done = broken.npd("run", "run.yaml", *sets)
    said = "\n".join(done.complaints(2))
    assert done.err == f"{said}\n"
    assert done.out == ""
    for part in case.says:
        assert part in said
    assert not broken.layout.root.exists()


def test_damaged_weights_are_told_after_everything_else_and_still_before_the_run(broken):
    said = broken.npd("run", "run.yaml").complaint(2)
    assert "student/model.safetensors is damaged or cut short" in said
    (broken.student / "model.safetensors").unlink()
    assert "has no .safetensors weights" in broken.npd("run", "run.yaml").complaint(2)
    assert not broken.layout.root.exists()


@pytest.mark.parametrize("source", ["nope.yaml", "ndp", "run.yml"])
def test_a_missing_config_names_the_presets(source, shell):
    said = shell.npd("run", source).complaint(2)
    assert source in said
    assert "npd, npd_adaptive, offline_kd" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], ["No such command 'rum'", "Did you mean 'run'?", "see npd --help"]),
        (["report"], ["No such command 'report'. Did you mean 'export'?: see npd --help"]),
        (["prepare", "--out", "m"], ["examples/demo/prepare.py"]),
        (["run"], ["missing argument 'CONFIG'", "see npd run --help"]),
        (["run", "run.yaml", "--resum"], ["--resum", "--resume", "see npd run --help"]),
        (["generate", "run.yaml"], ["--out", "see npd generate --help"]),
        (["show", "nowhere"], ["nowhere is not a run directory", "give the directory that"]),
        (["export", "nowhere", "m"], ["nowhere is not a run directory"]),
        (["score", "run.yaml", "--rollouts", "r", "--out", "s"], ["r does not exist", "stage"]),
        (["train", "run.yaml", "--data", "s", "--out", "m"], ["s does not exist", "stage"]),
        (["generate", "run.yaml", "--out", "o", "--snapshot", "./no"], ["./no", "--snapshot"]),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, shell):
    done = shell.npd(*arguments)
    said = done.complaint(2)
    assert done.err == f"{said}\n"
    for part in says:
        assert part.lower() in said.lower()


def test_another_vocabulary_is_found_by_content(broken):
    make_tokenizer(["some other words in here than there"] * 9).save_pretrained(broken.teacher)
    said = broken.npd("run", "run.yaml").complaint(2)
    assert "do not share a vocabulary: id" in said
    assert "use two models of one family" in said
    assert not broken.layout.root.exists()


def test_padded_vocabularies_go_together(shell, tmp_path):
    teacher = tmp_path / "padded"
    make_model(1, vocab=384).save_pretrained(teacher)
    make_tokenizer().save_pretrained(teacher)
    for loss in ("topk", "tail"):
        sets = ["--set", f"teacher={teacher}", "--set", f"loss.target={loss}"]
        done = shell.npd("run", "run.yaml", *sets, "--set", f"run_dir={loss}")
        assert done.code == 0, done.err


def test_there_must_be_a_run_to_resume(shell):
    said = shell.npd("run", "run.yaml", "--resume").complaint(2)
    assert "run holds no run to resume: start it without --resume" in said
    assert not shell.layout.root.exists()


@pytest.mark.parametrize("kind", ["a run", "other files"])
def test_a_directory_in_use_is_left_alone(kind, shell):
    if kind == "a run":
        assert shell.npd("run", "run.yaml").code == 0
    else:
        shell.layout.root.mkdir()
        (shell.layout.root / "thesis.tex").write_text("mine")
    before = {path: path.read_bytes() for path in shell.layout.root.rglob("*") if path.is_file()}
    said = shell.npd("run", "run.yaml").complaint(2)
    assert "choose another" in said
    assert ("--resume" in said) == (kind == "a run")
    assert {p: p.read_bytes() for p in shell.layout.root.rglob("*") if p.is_file()} == before


def test_resuming_with_another_config_names_the_key(shell):
    assert shell.npd("run", "run.yaml").code == 0
    said = shell.npd("run", "run.yaml", "--resume", "--set", "train.lr=0.5").complaint(2)
    assert "train.lr=0.002, now it is 0.5" in said
    assert "resume with the same config (--set train.lr=0.002), or start a new run" in said


def test_resuming_elsewhere_keeps_what_auto_meant(shell):
    assert shell.npd("run", "run.yaml").code == 0
    elsewhere = ["run", "run.yaml", "--resume", "--set", "runtime.kind=local"]
    assert "--set schedule.overlap=false" in shell.npd(*elsewhere).complaint(2)
    done = shell.npd(*elsewhere, "--set", "schedule.overlap=false")
    assert done.code == 0, done.err


def books(layout: RunLayout) -> None:
    """The conservation law holds and nothing is left over."""
    with Ledger.reader(layout.ledger_db) as ledger:
        conservation = ledger.conservation()
    assert conservation.holds
    assert conservation.asked == 40
    assert conservation.live == conservation.failed == 0


def test_a_non_finite_loss_ends_the_run_and_keeps_it(shell):
    hot = ["--set", "train.lr=1e30", "--set", "train.clip=1e30"]
    said = shell.npd("run", "run.yaml", *hot).complaint(1)
    assert re.search(r"step 2: .*gradient norm nan .*not taken.* Lower train\.lr", said)
    with Ledger.reader(shell.layout.ledger_db) as ledger:
        assert ledger.conservation().holds
    shown = shell.npd("show", "run")
    assert shown.code == 0
    assert "not finished" in shown.out


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system of `size` KiB; called again it grows."""
    place = tmp_path / "disk"
    place.mkdir()
    is_mounted = False

    def resize(size: int) -> Path:
        nonlocal is_mounted
        how = ["-o", f"remount,size={size}k", str(place)]
        new = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        done = subprocess.run(["mount", *(how if is_mounted else new)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"needs leave to mount a tmpfs: {done.stderr.decode().strip()}")
        is_mounted = True
        return place

    yield resize
    if is_mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("size", [4, 8, 12, 80, 100, 120, 220, 260, 350, 500, 900])
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(size, shell, small_disk):
    run = small_disk(size) / "run"
    # Only the largest has room for everything but a report.
    report = "true" if size == 900 else "false"
    there = ["--set", f"run_dir={run}", "--set", "observe.trace=false"]
    there += ["--set", f"observe.report={report}"]
    said = shell.npd("run", "run.yaml", *there).complaint(1)
    assert str(run) in said
    assert re.search(r"free (disk )?space", said)
    small_disk(8192)
    goes_on = ["--resume"] if (run / "config.json").exists() else []
    done = shell.npd("run", "run.yaml", *there, *goes_on)
    assert done.code == 0, done.err
    books(RunLayout(run))


def test_a_size_limit_in_worker_processes_is_a_full_disk_too(shell):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

    in_processes = ["--set", "runtime.kind=local"]
    shell.write(schedule={"overlap": True})
    said = shell.process("run", "run.yaml", *in_processes, preexec_fn=limit).complaint(1)
    assert re.search(r"free (disk )?space", said)
    done = shell.npd("run", "run.yaml", "--resume")
    assert done.code == 0, done.err
    books(shell.layout)
