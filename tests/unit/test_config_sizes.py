"""What `auto` comes to in `generate`, for each engine, window and number of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.config import RunConfig
from npd.config.load import dump_config, load_config
from npd.config.run import served_shard
from npd.errors import ConfigError
from npd.printing import config_lines
from simulation import Simulation, make_config

MODELS = ["student=s", "teacher=t"]
SERVED = ["generate.engine=vllm", "generate.launch.venv=v"]


def load(*sets: str, preset: str = "npd") -> RunConfig:
    return load_config(preset, [*MODELS, *sets]).config


@pytest.mark.parametrize("preset", ["npd", "npd_adaptive", "on_policy", "seqkd", "offline_kd"])
def test_in_process_it_is_32_and_32_whatever_the_run(preset):
    for prompts in (1, 40, 10**6):
        generate = load(preset=preset).sized(prompts).generate
        assert (generate.batch_size, generate.shard_size) == (32, 32)


@pytest.mark.parametrize(
    ("preset", "sets", "prompts", "expected"),
    [
        ("npd", [], 10**6, 1000),  # divides the pass, unlike 1,024
        ("npd", [], 7473, 1024),
        ("npd", [], 300, 75),  # a small run still pipelines
        ("npd", ["generate.samples_per_prompt=4"], 300, 300),
        ("npd", [], 40, 20),  # two at least
        ("npd", [], 1, 1),
        ("npd", ["schedule.overlap=false"], 300, 300),
        ("npd", ["schedule.overlap=false"], 5000, 1000),
        ("npd_adaptive", [], 10**6, 256),  # its window is 1,024
        ("npd_adaptive", ["generate.workers=4"], 10**6, 64),
        ("on_policy", [], 10**6, 64),  # a batch at once
        ("seqkd", [], 10**6, 1000),
        ("npd", ["generate.shard_size=7"], 10**6, 7),
    ],
)
def test_a_servers_shard_is_a_share_of_the_window(preset, sets, prompts, expected):
    generate = load(*SERVED, *sets, preset=preset).sized(prompts).generate
    assert (generate.batch_size, generate.shard_size) == (256, expected)


def test_each_server_of_a_generator_counts():
    urls = "generate.urls=[http://a, http://b, http://c, http://d]"
    config = load("generate.engine=vllm", urls, preset="npd_adaptive")
    assert config.sized(5000).generate.shard_size == 64


@given(st.integers(1, 10**5), st.integers(1, 20), st.booleans())
def test_the_window_holds_two_shards_where_stages_overlap(window, servers, is_overlapped):
    size = served_shard(window, servers, is_overlapped=is_overlapped)
    assert 1 <= size <= min(1024, window)
    assert not is_overlapped or window < 2 or 2 * size <= window


def test_a_window_below_two_shards_is_refused_in_process_only():
    small = ["schedule.steps=8", "schedule.refresh=never", "schedule.window=40",
             "train.batch_size=8"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"schedule.window \(40\) must hold two"):
        load(*small)
    assert load(*small, *SERVED).sized(100).generate.shard_size == 20


def test_sizes_are_final():
    """A resumed run has the numbers of its record, which do not depend on `auto` any more."""
    sized = load(*SERVED).sized(300)
    again = RunConfig.model_validate(dump_config(sized))
    assert again == sized == again.sized(5000)
    assert again.shard_size == 75


def test_what_auto_is_stands_beside_it():
    def line(key: str, *sets: str, preset: str = "npd") -> str:
        lines = config_lines(load_config(preset, [*MODELS, *sets]))
        return next(" ".join(line.split()) for line in lines if line.startswith(f"{key}: "))

    assert line("generate.batch_size") == "generate.batch_size: auto # default: 32"
    assert line("generate.batch_size", *SERVED) == "generate.batch_size: auto # default: 256"
    assert line("generate.shard_size", *SERVED, preset="npd_adaptive").endswith("# default: 256")
    shard = line("generate.shard_size", *SERVED)
    assert shard == "generate.shard_size: auto # default: up to 1024, by the prompts"
    assert line("generate.shard_size", "generate.shard_size=9").endswith("9 # --set")


@pytest.mark.parametrize("window", ["all", 4, 7, 40, 1000])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 7, 40, 300])
def test_a_run_ends_whatever_its_window_and_prompts_are(window, overlap, num_prompts):
    served = {"engine": "vllm", "launch": {"venv": "v"}, "shard_size": "auto"}
    keep_all = {"name": "none", "max_repeat": 1.0, "min_response_tokens": 1}
    config = make_config(
        epochs=4, reuse=2, window=window, overlap=overlap, generate=served,
        refresh={"at_epochs": 2}, filter={**keep_all, "drop_truncated": False},
    )  # fmt: skip
    simulation = Simulation(config.sized(num_prompts), num_prompts, seed=3).run()
    assert simulation.stop.reason == "done"
    assert set(simulation.outcomes) == set(simulation.asked)
