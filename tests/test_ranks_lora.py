"""Adapters trained by several ranks (real processes): the frozen base is shared out too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import npd
from npd.config import LoraConfig
from npd.models.loading import load_model
from npd.store.layout import RunLayout
from npd.train.fsdp import gather
from rank_bench import gradients_of, on_ranks
from test_ranks import (
    BF16,
    FP32,
    LOSS,
    STEPS,
    arrays,
    check_alike,
    check_same,
    factory_of,
    numbers,
    one_rank,  # noqa: F401
    samples,  # noqa: F401
    segment_on,
)
from test_run import QuietView, check_same_run
from test_trainer import make_trainer, teacher  # noqa: F401
from tiny_model import save_model
from tiny_run import tiny_config, write_prompts

pytestmark = pytest.mark.timeout(1200)
# Three does not divide by two or by four: some rank holds a smaller part, or none.
LORA = LoraConfig(rank=3, alpha=6)


def with_lora(config):
    return config.model_copy(update={"lora": LORA})


def in_float32(trainer):
    found = trainer.model.named_parameters()
    return {name: gather(p.detach()).float().numpy() for name, p in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tied", "config"),
    [(2, True, BF16), (4, False, FP32)],
    ids=["2-tied-bf16-recomputed", "4-untied"],
)
def test_ranks_train_the_adapters_of_one(size, tied, config, samples, tmp_path, one_rank):  # noqa: F811
    directory, config = save_model(tmp_path / "student", seed=0, tied=tied), with_lora(config)
    alone = make_trainer(directory, samples, config, LOSS, dist=one_rank(config))
    start, kept = in_float32(alone), {}
    alone.optimizer.register_step_pre_hook(lambda *_: kept.update(gradients_of(alone)))
    expected = alone.train(segment_on(1, samples))

    async def story(group):
        calls = [("train", segment_on(size, samples)), ("last_gradients",), ("weights",), ("held",),
                 ("write", tmp_path / "ranks")]  # fmt: skip
        return [(await group.call(*call)).value for call in calls]

    made = factory_of(size, directory, samples, config)
    reports, gradients, found, held, gathered_base = on_ranks(tmp_path, made, story)
    check_alike(expected.steps, reports[0].steps)
    check_same(kept, gradients, atol=1e-7, rtol=2e-3)
    check_same(in_float32(alone), found, atol=1e-5)
    frozen = {name for name in start if ".lora_" not in name}
    assert all((start[name] == found[name]).all() for name in frozen), "the base stays as it is"
    assert sum(held) == sum(w.size for w in found.values()), "each number is held once"
    assert max(held) < 1.2 * sum(held) / size, "the base is shared out, not copied"
    for report in reports[1:]:
        assert [numbers(s) for s in report.steps] == [numbers(s) for s in reports[0].steps]

    assert gathered_base is False, "an adapter is written without its base"
    alone.save_snapshot(tmp_path / "one" / "snapshot")
    alone.save_pretrained(tmp_path / "one" / "export")
    for file in ("snapshot/adapter_model.safetensors", "export/model.safetensors"):
        one, several = (load_file(tmp_path / name / file) for name in ("one", "ranks"))
        assert one.keys() == several.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(several[name], tensor, atol=1e-3, rtol=1e-2)
    merged = load_model(tmp_path / "ranks" / "snapshot", dtype="bfloat16", packed=False)
    exported = load_file(tmp_path / "ranks" / "export" / "model.safetensors")
    parameters = dict(merged.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in exported.items())


@pytest.mark.slow
def test_adapters_go_from_two_ranks_to_one_and_back(samples, tmp_path, tiny_model_dir):  # noqa: F811
    config = with_lora(FP32)
    straight = make_trainer(tiny_model_dir, samples, config, LOSS)
    parts = [segment_on(1, samples, first=first) for first in (1, 5, 9)]
    expected = [straight.train(part) for part in parts]
    middle = make_trainer(tiny_model_dir, samples, config, LOSS)

    async def story(group):
        first = await group.call("train", segment_on(2, samples, first=1))
        await group.call("save", tmp_path / "of-two")
        assert middle.load_checkpoint(tmp_path / "of-two") == len(STEPS)
        second = middle.train(parts[1])
        middle.save_checkpoint(tmp_path / "of-one")
        assert (await group.call("load", tmp_path / "of-one")).value == 2 * len(STEPS)
        third = await group.call("train", segment_on(2, samples, first=9))
        return first.value[0], second, third.value[0], (await group.call("weights")).value

    made = factory_of(2, tiny_model_dir, samples, config)
    *reports, found = on_ranks(tmp_path, made, story)
    for one, other in zip(expected, reports, strict=True):
        check_alike(one.steps, other.steps)
    check_same(arrays(straight), found, atol=1e-5)
    stored = [load_file(tmp_path / d / "model.safetensors") for d in ("of-one", "of-two")]
    assert stored[0].keys() == stored[1].keys()
    assert all(".lora_" in name for name in stored[0])


@pytest.mark.slow
def test_a_run_of_adapters_on_two_ranks(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def config(name, ranks, kind):
        train = {"batch_size": 6, "row_tokens": 112, "lr": 1e-2, "min_lr": 1e-3, "ranks": ranks,
                 "dtype": "float32", "lora": {"rank": 4}}  # fmt: skip
        schedule = {"epochs": 4, "reuse": 2, "refresh": {"at_epochs": [2]}, "overlap": False}
        return tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, schedule=schedule,
            train=train, runtime={"kind": kind, "device": "cpu", "threads": 1},
        )  # fmt: skip

    one = npd.run(config("one", 1, "inline"), view=QuietView())
    two = npd.run(config("two", 2, "local"), view=QuietView())
    layout = RunLayout(two.directory)
    check_same_run(one, two, rtol=1e-2)
    assert max(step["num_rows"] for step in two.data.steps) > 1
    assert (layout.student / "adapter" / "adapter_model.safetensors").is_file()
