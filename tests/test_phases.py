"""`runtime.share: phases`: one role's models on the device at a time, and the same student."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import npd
from npd.config import LoraConfig, LossConfig
from npd.control.devices.defaults import chosen, with_defaults
from npd.control.devices.memory import parse_gpus
from npd.control.devices.placement import WorkerSet, check_gpus
from npd.control.devices.turns import DeviceTurns
from npd.control.preflight import prepare
from npd.control.run_record import recorded_config
from npd.errors import ConfigError, WorkerLostError
from npd.models.distributed import connect_alone
from npd.observe.trace import read_trace
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from npd.train.fsdp import gather
from npd.train.objective import move, to_host
from npd.types import SampleRequest
from npd.workers import Factory, GenerateTask, ScoreTask
from run_process import check_books
from test_progress import Interrupting
from test_ranks import samples, segment_on  # noqa: F401
from test_run import QuietView, check_same_student
from test_trainer import FP32, make_trainer, teacher  # noqa: F401
from tiny_run import tiny_config, write_prompts

PHASES = {"kind": "inline", "share": "phases"}
ROLES = {"generate": "generator", "score": "scorer", "held-out": "scorer"}


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def build(name="run", **sections):
        return tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, **sections)

    return build


def turns(result) -> list[str]:
    """The roles that had the device, in order: no two at once, each released before the next."""
    spans = read_trace(RunLayout(result.directory).trace_jsonl)
    found = ["trainer"]  # which loads first
    end, is_released = 0.0, False
    for span in sorted(spans, key=lambda span: span.start):
        role = span.worker.partition("-")[0]
        if role == "controller" or span.name == "load":
            continue
        if role != found[-1]:
            assert is_released, f"{found[-1]} keeps the device"
            assert end <= span.start + 1e-3, "two roles at once"
            found.append(role)
            is_released = False
        if span.name == "release":
            is_released = True
        end = max(end, span.end)
    return found


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_roles_take_turns_and_the_student_is_that_of_stages_in_turn(make, kind):
    in_turn = npd.run(make("in-turn", schedule={"overlap": False}), view=QuietView())
    phases = npd.run(make("phases", runtime={"kind": kind, "share": "phases"}), view=QuietView())
    assert turns(phases) == [
        "trainer",
        "scorer",
        "trainer",
        *["generator", "scorer", "trainer"] * 2,
    ]
    check_same_student(in_turn, phases)
    check_books(RunLayout(phases.directory), reuse=2)


def models() -> list[torch.nn.Module]:
    """Every model that this process holds."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), PreTrainedModel)]


def test_a_released_worker_holds_no_model_and_works_on(make, tmp_path):
    config = make(checkpoint={"keep": 5}, schedule={"refresh": "never"})
    layout = RunLayout(npd.run(config, view=QuietView()).directory)
    before = len(models())
    rollouts = read_rollouts(layout.rollouts(0))
    prompts = prepare(config).prompts
    requests = tuple(SampleRequest(r.sample_id, r.seed, prompts[r.prompt_index]) for r in rollouts)
    ids = tuple(r.sample_id for r in rollouts)
    for role, path, method, task in (
        ("generator", layout.rollouts(0), "generate", GenerateTask(0, 0, requests)),
        ("scorer", layout.scored(0), "score", ScoreTask(0, 0, ids)),
    ):
        worker, results = Factory(role, config, layout.root)(), []
        for _ in range(2):
            path.unlink()
            results.append(getattr(worker, method)(task))
            assert len(models()) > before, "it loads what it needs"
            worker.release()
            assert len(models()) == before, role
        assert results[0].stats == results[1].stats
        worker.close()


def test_a_moved_student_is_the_same_objects_with_the_same_values(tiny_model_dir):
    """Every tensor gets new memory, as it does on its way to a device, and training goes on."""

    def losses(is_moved: bool) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids, found = torch.arange(40).reshape(2, 20), []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.item())
            if is_moved:
                parameters = [*model.parameters()]
                old = tensors_of(model, optimizer)  # kept, so that no address is used again
                move(model, optimizer, torch.clone)
                new = tensors_of(model, optimizer)
                assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
                assert not {t.data_ptr() for t in old} & {t.data_ptr() for t in new}
        return found

    assert losses(is_moved=True) == losses(is_moved=False)


def tensors_of(model, optimizer) -> list[torch.Tensor]:
    """The tensors of a student in training."""
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    return [tensor.data for tensor in (*model.parameters(), *model.buffers(), *moments)]


@pytest.mark.parametrize("kind", ["plain", "8 bits", "sharded", "lora"])
def test_a_trainer_off_its_device_and_back_goes_on_to_the_bit(kind, samples, tiny_model_dir):  # noqa: F811
    config = FP32 if kind != "sharded" else FP32.model_copy(update={"dtype": "bfloat16"})
    if kind == "8 bits":
        config = config.model_copy(update={"optimizer": "adamw8bit"})
    if kind == "lora":
        config = config.model_copy(update={"lora": LoraConfig(rank=2)})

    def weights(is_moved: bool) -> dict[str, torch.Tensor]:
        dist = connect_alone("cpu") if kind == "sharded" else None
        trainer = make_trainer(tiny_model_dir, samples, config, LossConfig(), dist=dist)
        for first in (1, 5):
            trainer.train(segment_on(1, samples, first=first))
            if is_moved:
                before = dict(trainer.model.named_parameters())
                trainer.off_device()
                trainer.to_device()
                after = dict(trainer.model.named_parameters())
                assert all(after[name] is value for name, value in before.items())
        return {name: gather(p.detach()).clone() for name, p in trainer.model.named_parameters()}

    stayed, moved = weights(is_moved=False), weights(is_moved=True)
    assert all(torch.equal(stayed[name], value) for name, value in moved.items())


def test_gradients_are_not_moved(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    with pytest.raises(AssertionError, match="between steps"):
        move(model, torch.optim.AdamW(model.parameters()), torch.clone)


def test_a_copy_on_the_host_is_exact_where_nothing_can_be_locked():
    tensor = torch.randn(3, 4)[:, ::2]
    assert torch.equal(to_host(tensor), tensor)
    assert to_host(torch.tensor(3.0)).item() == 3.0


class FakeWorker:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("seed", range(5))
def test_a_call_waits_for_the_calls_and_the_release_of_other_roles(seed):
    workers = {
        name: FakeWorker(name) for name in ("generator-0", "generator-1", "scorer-0", "trainer")
    }
    team = WorkerSet(
        (workers["generator-0"], workers["generator-1"]), (workers["scorer-0"],), workers["trainer"]
    )
    order = random.Random(seed)
    running: Counter[str] = Counter()
    loaded: set[str] = {"trainer"}

    async def release(worker):
        assert not running.total(), "released in the middle of a call"
        assert worker.name in loaded or worker.name.startswith("generator"), "it had no turn"
        await asyncio.sleep(0)
        loaded.discard(worker.name)

    async def call(device, worker):
        for _ in range(order.randint(0, 5)):
            await asyncio.sleep(0)
        async with device.of(worker):
            running[worker.name] += 1
            loaded.add(worker.name)
            for _ in range(order.randint(1, 5)):
                await asyncio.sleep(0)
                assert len({name.partition("-")[0] for name in loaded}) == 1
            running[worker.name] -= 1
            if order.random() < 0.2:
                raise WorkerLostError("it died")

    async def main():
        device = DeviceTurns(team, release)
        names = [order.choice([*workers]) for _ in range(40)]
        calls = [call(device, workers[name]) for name in names]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(main())
    assert {type(item) for item in found} <= {type(None), WorkerLostError}


@pytest.mark.slow
def test_workers_killed_in_their_phases_are_replaced(make_run):
    run = make_run(runtime={"kind": "local", "share": "phases"})
    run.finish_killing(run.start())
    check_books(run.layout, reuse=2)


@pytest.mark.slow
def test_a_controller_killed_in_each_phase_makes_the_same_student(make_run, make):
    whole = npd.run(make("whole", runtime=PHASES), view=QuietView())
    run = make_run(runtime=PHASES)
    with Ledger.reader(RunLayout(whole.directory).ledger_db) as ledger:
        events = sum(1 for _ in ledger.events())
    run.finish_killed(
        [share * events for share in (0.15, 0.5, 0.8)], made=(run.layout.root, "*.arrow")
    )
    expected = (whole.student / "model.safetensors").read_bytes()
    assert (run.layout.student / "model.safetensors").read_bytes() == expected


def test_a_resumed_run_keeps_its_phases(make):
    result = npd.run(make(runtime=PHASES), view=Interrupting())
    assert not result.is_done
    with pytest.raises(ConfigError, match=r"runtime\.share='phases'"):
        npd.run(make(runtime={"share": "together"}), resume=True, view=QuietView())
    resumed = npd.run(make(), resume=True, view=QuietView())
    assert resumed.is_done
    assert recorded_config(RunLayout(resumed.directory)).runtime.share == "phases"


def test_a_run_from_before_phases_goes_on_as_it_was(make):
    result = npd.run(make(), view=Interrupting())
    path = RunLayout(result.directory).config_json
    record = json.loads(path.read_text())
    del record["config"]["runtime"]["share"]
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"runtime\.share='together'"):
        npd.run(make(runtime=PHASES), resume=True, view=QuietView())
    assert npd.run(make(), resume=True, view=QuietView()).is_done


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"schedule": {"overlap": True}}, "schedule.overlap: true runs stages at the same time"),
        ({"runtime": {"kind": "ray"}}, "Ray gives each worker GPUs of its own"),
        ({"train": {"ranks": 2}, "runtime": {"kind": "local"}}, "train.ranks is 2"),
        ({"score": {"ranks": 2}, "runtime": {"kind": "local"}}, "score.ranks is 2"),
    ],
)
def test_what_contradicts_phases_is_refused(make, sections, says):
    runtime = {**PHASES, **sections.pop("runtime", {})}
    with pytest.raises(ConfigError, match=says):
        make(runtime=runtime, **sections)


def test_phases_are_for_one_gpu(make):
    config = make(runtime={"kind": "local", "device": "cuda", "share": "phases"})
    with pytest.raises(ConfigError, match=r"phases is for one device, but .* GPUs 0, 1, 2"):
        check_gpus(config, ["0", "1", "2"])
    one = {"train": {"gpus": [1]}, "score": {"gpus": [1]}, "generate": {"gpus": [1]}}
    check_gpus(make(runtime=config.runtime.model_dump(), **one), ["0", "1", "2"])


def test_a_resumed_run_says_what_contradicts_its_phases(make):
    npd.run(make(runtime=PHASES), view=Interrupting())
    with pytest.raises(ConfigError, match=r"cannot go on so: .* Ray gives each worker"):
        npd.run(make(runtime={"kind": "ray"}), resume=True, view=QuietView())


def test_auto_is_phases_where_every_model_is_on_one_gpu(make):
    def share(gpus: str, **sections) -> str:
        sections = {"runtime": {"kind": "local", "device": "cuda"}} | sections
        return with_defaults(make(**sections), parse_gpus(gpus)).runtime.share

    served = {"engine": "vllm", "urls": ["http://127.0.0.1:1"]}
    launched = {"engine": "vllm", "launch": {}}
    assert share("1x80GB") == "phases"
    assert share("2x80GB") == "together"
    assert share("4x80GB") == "together"
    assert share("1x80GB", generate=served) == "together", "its model is elsewhere"
    assert share("1x80GB", generate=launched) == "phases"
    assert share("2x80GB", generate={**launched, "launch": {"gpus": ["1"]}}) == "together"
    assert share("1x80GB", schedule={"overlap": True}) == "together"
    assert share("2x80GB", runtime={"kind": "local", "device": "cuda:1"}) == "phases"
    assert share("2x80GB", runtime={"kind": "inline", "device": "cuda"}) == "phases"
    assert share("1x80GB", runtime={"kind": "ray", "device": "cuda"}) == "together"
    assert (
        share("1x80GB", runtime={"kind": "local", "device": "cuda", "share": "together"})
        == "together"
    )
    config = make(runtime={"kind": "local", "device": "cuda"})
    assert "in turn" in chosen(config, with_defaults(config, parse_gpus("1x80GB")))[0]
    assert with_defaults(make()).runtime.share == "together", "no GPU: as it was"
