"""What a newcomer may get wrong: each command with the one line that answers it.

`tests/data/bad_inputs.txt` is the table: a command after `$`, then what `npd` says to it, a line a
problem. `{here}`, `{student}`, `{long}` and the like stand for what differs between machines or
would fill the page; `…` stands for words of a library.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from npd.__main__ import run as npd_main
from tiny_run import tiny_settings, write_prompts

TABLE = Path(__file__).parent / "data" / "bad_inputs.txt"
LONGEST = 300
# Words of Python, pydantic and PyYAML that say nothing to a user.
JARGON = re.compile(
    r"bug of npd|Traceback|Input should|NoneType|__\w+__|Errno|Error:|Error\(|ValueError|errno|"
    r"<class|pydantic|node content|stream end|\bdict\b|\bstr\b|\bint\b|\bfloat\b|\bbool\b|tuple"
)
STANDINS = {"long": "n" * 300, "digits": "9" * 5000, "brackets": "[" * 2000}


@dataclass(frozen=True)
class Case:
    """A command, and the lines it is answered by (without `error: `)."""

    command: str
    says: tuple[str, ...]

    def arguments(self, standins: dict[str, str]) -> list[str]:
        words = shlex.split(self.command)
        for name, text in standins.items():
            words = [word.replace(f"{{{name}}}", text) for word in words]
        return words


def cases() -> Iterator[Case]:
    command, says = "", []
    for line in [*TABLE.read_text().splitlines(), "$ "]:
        if line.startswith("$ "):
            if command:
                yield Case(command, tuple(says))
            command, says = line[2:], []
        elif line and not line.startswith("#"):
            says.append(line)


CASES = list(cases())


def make_shell(folder: Path, student: Path, teacher: Path) -> Path:
    """A folder with good configs and prompts, and with everything that is no good."""
    write_prompts(folder / "prompts.jsonl")
    settings = tiny_settings(student, teacher, "prompts.jsonl", "run")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    plain = {"loss": {"kd_weight": 0.0}, "filter": {"name": "none"}}
    settings = tiny_settings(student, teacher, "prompts.jsonl", "run", **plain)
    (folder / "sft.yaml").write_text(yaml.safe_dump(settings))
    for name, text in bad_texts().items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    make_odd_files(folder)
    make_arrows(folder)
    return folder


@pytest.fixture(scope="module")
def shell(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    return make_shell(tmp_path_factory.mktemp("shell"), tiny_model_dir, tiny_teacher_dir)


def bad_texts() -> dict[str, str | bytes]:
    good = "preset: npd\nstudent: s\nteacher: t\n"
    bomb = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for above, below in zip("abcdefgh", "bcdefghi", strict=True):
        bomb.append(f"{below}: &{below} [{','.join([f'*{above}'] * 9)}]")
    return {
        "bomb.yaml": "\n".join(bomb),
        "deep.yaml": "".join(f"{' ' * i}a:\n" for i in range(500)),
        "deep.json": '{"a": ' * 20_000,
        "deepmap.yaml": "a: " + "[" * 20_000,
        "itself.yaml": "a: &a {b: *a}\n",
        "twice.yaml": f"{good}train:\n  lr: 1\n  lr: 2\n",
        "dotted.yaml": f"{good}train.lr: 1\ntrain: {{lr: 2}}\n",
        "documents.yaml": f"{good}---\nseed: 1\n",
        "list.yaml": "- student\n- teacher\n",
        "text.yaml": "hello",
        "number.yaml": "5",
        "empty.yaml": "",
        "utf16.yaml": good.encode("utf-16"),
        "latin1.yaml": "name: é\n".encode("latin-1"),
        "nul.yaml": "student: a\0b\n",
        "binary.yaml": bytes(range(256)),
        "tab.yaml": f"{good}train:\n\tlr: 1\n",
        "tag.yaml": f"{good}name: !!binary abc\n",
        "python.yaml": f"{good}name: !!python/object/apply:os.system [ls]\n",
        "merge.yaml": f"{good}<<: 3\n",
        "listkey.yaml": f"{good}? [a]\n: 1\n",
        "emptykey.yaml": f"{good}'': 1\n",
        "digits.yaml": f"{good}seed: {'1' * 5000}\n",
        "large.yaml": "# much\n" * 200_000,
        "many.yaml": "".join(f"key{i}: 1\n" for i in range(3000)),
        "cut.json": '{"student": "s",',
        "page.html": "<!DOCTYPE html><html><head>\n<title>404: not found</title></head></html>\n",
        "train.toml": "[train]\nlr = 1e-5\n",
        "loop.py": "import npd\n",
        "backslash.yaml": 'student: "C:\\models"\n',
        "unclosed.yaml": "train: {lr: 1\nseed: 2\n",
        "colon.yaml": "student: a: b\n",
        "indent.yaml": "train:\n  lr: 1\n clip: 2\n",
        "alias.yaml": "student: *model\n",
        "quote.yaml": "student: 'a\n",
        "nopreset.yaml": "preset: ndp\nstudent: s\n",
        "presets.yaml": "preset: [npd, sft]\nstudent: s\n",
        **other_programs(),
        "section.yaml": f"{good}train: 5\ndata: prompts.jsonl\n",
        "value.yaml": f"{good}train: {{lr: {{value: 1e-5}}}}\n",
        "empty.jsonl": "",
        "table.csv": "prompt\na\nb,c\n",
        "quote.csv": 'prompt\n"a\nb\n',
        "semicolon.csv": "prompt;completion\na;b\n",
        "cut.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n')[:-4],
        "plain.jsonl.zst": '{"prompt": "a"}\n',
        "text.parquet": "hello",
        "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "\n",
        "digits.jsonl": f'{{"prompt": "a", "answer": {"1" * 5000}}}\n',
        "binary.jsonl": bytes(range(256)),
        "utf16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
        "list.jsonl": "[1, 2]\n",
        "other.jsonl": '{"problem": "a?", "reply": "b"}\n',
        "both.jsonl": '{"question": "a?", "prompt": "b"}\n',
        "mixed.jsonl": '{"prompt": "a?"}\n{"instruction": "b"}\n',
    }


def other_programs() -> dict[str, str]:
    """Configs as they are written for other programs."""
    return {
        "trl.yaml": yaml.safe_dump(
            {
                "model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "d",
                "learning_rate": 2e-5, "num_train_epochs": 1, "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 4, "gradient_checkpointing": True,
                "max_length": 1024, "packing": True, "bf16": True, "lmbda": 0.5, "beta": 0.5,
                "max_new_tokens": 128, "logging_steps": 10, "save_steps": 100, "eval_steps": 100,
                "eval_strategy": "steps", "report_to": "wandb", "push_to_hub": False,
                "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "output_dir": "out",
            },
            sort_keys=False,
        ),
        "axolotl.yaml": (
            "base_model: s\nload_in_4bit: true\nadapter: qlora\nlora_r: 16\n"
            "datasets:\n  - path: d\n    type: alpaca\nsequence_len: 2048\n"
            "sample_packing: true\nmicro_batch_size: 2\nval_set_size: 0.05\n"
            "flash_attention: true\nwandb_project: x\n"
        ),
        "llamafactory.yaml": (
            "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
            "template: qwen\ncutoff_len: 2048\nplot_loss: true\nfp16: true\n"
        ),
        "torchtune.yaml": (
            "tokenizer:\n  _component_: torchtune.models.llama3.llama3_tokenizer\n  path: x\n"
            "optimizer:\n  _component_: torch.optim.AdamW\n  lr: 2e-5\n"
            "lr_scheduler:\n  num_warmup_steps: 100\nmax_steps_per_epoch: 10\n"
            "metric_logger:\n  _component_: torchtune.training.metric_logging.DiskLogger\n"
        ),
    }  # fmt: skip


def make_odd_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    for name in ("fifo", "fifo.jsonl"):
        os.mkfifo(folder / name)
    for name in ("sparse", "sparse.jsonl", "sparse.parquet"):
        with (folder / name).open("wb") as file:
            file.truncate(5 * 2**30)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the address of a socket is short
        server.bind("socket")
        os.chdir(here)
    for name, config in {"cutmodel": "{", "deepmodel": "[" * 100_000}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)


def make_arrows(folder: Path) -> None:
    import pyarrow as pa

    from npd.store.shards import write_rollouts, write_scored
    from store_samples import make_rollout, make_scored

    write_rollouts(folder / "rollouts.arrow", [make_rollout(0)])
    write_scored(folder / "scored.arrow", [make_scored(0)])
    whole = (folder / "rollouts.arrow").read_bytes()
    (folder / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    table = pa.table({"a": [1, 2, 3]})
    with pa.ipc.new_stream(str(folder / "other.arrow"), table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def standins(shell, tiny_model_dir, tiny_teacher_dir, monkeypatch):
    """What the names in braces stand for; the test works in the folder, for a minute at most."""
    monkeypatch.chdir(shell)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(120)
    yield {**STANDINS, "student": str(tiny_model_dir), "teacher": str(tiny_teacher_dir)}
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(number: int, frame: object) -> None:
    raise AssertionError("no answer within two minutes")


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def told(text: str, standins: dict[str, str], shell: Path) -> str:
    """The output as the table has it: what differs between machines under its name."""
    named = {"here": str(shell), "student": standins["student"], "teacher": standins["teacher"]}
    for name, value in named.items():
        text = text.replace(value, f"{{{name}}}")
    return text


def matches(wanted: str, line: str) -> bool:
    """Whether a line is the wanted one, in which `…` stands for anything."""
    return re.fullmatch(re.escape(wanted).replace("…", ".*"), line) is not None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.command)
def test_a_bad_input_is_answered_by_a_line(case, shell, standins, capsys):
    before = listing(shell)
    code = npd_main(case.arguments(standins))
    error = capsys.readouterr().err
    lines = told(error, standins, shell).splitlines()
    assert code == 2, error
    assert all(line.startswith("error: ") for line in lines), error
    found = [line.removeprefix("error: ") for line in lines]
    assert len(found) == len(case.says), error
    assert all(map(matches, case.says, found)), error
    assert all(len(line) <= LONGEST for line in lines)
    assert not JARGON.search(error)
    assert listing(shell) == before


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.command.startswith("run ") and " run_dir=. " not in
             f"{case.command} " and not case.says[-1].endswith("--help")],
    ids=lambda case: case.command,
)  # fmt: skip
def test_doctor_says_the_same_first(case, shell, standins, capsys):
    arguments = ["doctor", *case.arguments(standins)[1:], "--json"]
    assert npd_main(arguments) == 2
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = [" ".join(c["says"].split()) for c in checks if c["status"] == "FAIL"]
    found = [told(line, standins, shell) for line in failed[: len(case.says)]]
    assert len(found) == len(case.says), checks
    assert all(map(matches, case.says, found)), checks


def test_there_are_many_cases_and_each_is_there_once():
    commands = [case.command for case in CASES]
    assert len(commands) >= 250
    assert len(set(commands)) == len(commands)
