"""Values and combinations a config refuses, each with its remedy, and what it still allows."""

import copy
import math

import pytest

from npd.config import RunConfig
from npd.errors import ConfigError

BASE = {"student": "s", "teacher": "t", "schedule": {"epochs": 10}}
DRIFT = {"steps": 8, "refresh": {"drift": 0.1}}
OVERLAP = {"steps": 8, "refresh": "never", "window": 64, "overlap": True}


def config(**sections):
    return RunConfig.model_validate({**copy.deepcopy(BASE), **sections})


REFUSED = {
    "drift of tempered samples": (
        {"schedule": DRIFT, "generate": {"temperature": 0.7}}, "--set generate.temperature=1"
    ),
    "drift of a nucleus": (
        {"schedule": DRIFT, "generate": {"top_p": 0.9}}, "--set generate.top_p=1"
    ),
    "reverse of topk": ({"loss": {"divergence": "reverse"}}, "loss.target: tail or renorm"),
    "jsd of topk": ({"loss": {"divergence": "jsd"}}, "loss.target: tail or renorm"),
    "skipping without a teacher": (
        {"loss": {"kd_weight": 0.0, "skip_after": 0.01}, "filter": {"name": "none"}},
        "set loss.skip_after: 0, or loss.kd_weight above 0",
    ),
    "skipping after all": ({"loss": {"skip_after": 1.0}}, "less than 1"),
    "skipping nothing": ({"loss": {"skip_after": 0.1, "skip_tokens": 0}}, "at least 1"),
    "unknown device": ({"runtime": {"device": "gpu"}}, "must be auto, cpu, cuda or cuda:N"),
    "device by its maker": ({"runtime": {"device": "rocm"}}, "cuda:N (AMD's GPUs too)"),
    "numbered CPU": ({"runtime": {"device": "cpu:0"}}, "must be auto, cpu, cuda or cuda:N"),
    "deterministic in a process that does all at once": (
        {"train": {"deterministic": True}, "runtime": {"kind": "inline"},
         "schedule": {"overlap": True}},
        "set schedule.overlap: false",
    ),
    "device without its number": ({"runtime": {"device": "cuda:"}}, "cuda:N"),
    "a server's memory said twice": (
        {"generate": {"engine": "vllm", "launch": {
            "venv": "v", "memory": 0.5, "args": ["--gpu_memory_utilization=0.4"]}}},
        "generate.launch.memory and --gpu-memory-utilization in generate.launch.args are the same",
    ),
    "more than all of its memory": (
        {"generate": {"engine": "vllm", "launch": {"venv": "v", "memory": 1.5}}}, "at most 1"
    ),
    "infinite number": ({"filter": {"high": math.inf}}, "finite number"),
    "no number": ({"train": {"lr": math.nan}}, "finite number"),
    "beta of 1": ({"train": {"betas": (0.9, 1.0)}}, "less than 1"),
    "negative beta": ({"train": {"betas": (-0.1, 0.9)}}, "at least 0"),
    "name with a path": ({"name": "a/b"}, "put a path in run_dir"),
    "name with a backslash": ({"name": "a\\b"}, "put a path in run_dir"),
    "empty name": ({"name": ""}, "plain directory name"),
    "parent directory": ({"name": ".."}, "plain directory name"),
    "refresh after the last epoch": (
        {"schedule": {"epochs": 10, "refresh": {"at_epochs": [5, 10]}}}, "at_epochs must be at most"
    ),
    "keep without a control": ({"filter": {"keep": 0.5}}, "set filter.name: random"),
    "keep without a filter": ({"filter": {"name": "none", "keep": 0.5}}, "filter.name: random"),
    "responses never long enough": (
        {"generate": {"max_new_tokens": 8}, "filter": {"min_response_tokens": 9}},
        "--set filter.min_response_tokens=8",
    ),
    "window too small to overlap": (
        {"schedule": OVERLAP, "generate": {"shard_size": 33}}, "--set generate.shard_size=32"
    ),
}  # fmt: skip

ALLOWED = {
    "drift of the policy": {"schedule": DRIFT},
    "reverse of tail": {"loss": {"divergence": "reverse", "target": "tail"}},
    "jsd of renorm": {"loss": {"divergence": "jsd", "target": "renorm"}},
    "skipping by a filter's teacher": {"loss": {"kd_weight": 0.0, "skip_after": 0.01}},
    "another kind of device": {"runtime": {"device": "npu:1"}},
    "deterministic in turn": {"train": {"deterministic": True}, "runtime": {"kind": "inline"}},
    "numbered device": {"runtime": {"device": "cuda:1"}},
    "beta of 0": {"train": {"betas": (0.0, 0.999)}},
    "name with dots": {"name": "run.2"},
    "refresh before the last epoch": {
        "schedule": {"epochs": 10, "reuse": 1, "refresh": {"at_epochs": [9]}}
    },
    "keep of a control": {"filter": {"name": "random", "keep": 0.5}},
    "responses just long enough": {
        "generate": {"max_new_tokens": 8}, "filter": {"min_response_tokens": 8}
    },
    "window of two shards": {"schedule": OVERLAP, "generate": {"shard_size": 32}},
    "small window in turn": {
        "schedule": {**OVERLAP, "overlap": False}, "generate": {"shard_size": 64}
    },
    "small window over a data set": {
        "schedule": OVERLAP, "generate": {"shard_size": 64, "source": "dataset"}
    },
}  # fmt: skip


@pytest.mark.parametrize(("sections", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_the_remedy(sections, remedy):
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    said = str(caught.value)
    assert remedy in said
    assert said.startswith("RunConfig: ")
    assert "\n" not in said


@pytest.mark.parametrize("sections", ALLOWED.values(), ids=ALLOWED)
def test_what_is_near_a_rule_and_can_be_is_allowed(sections):
    config(**sections)


@pytest.mark.parametrize(
    ("runtime", "problem"),
    [
        ({"kind": "ray", "device": "cuda:1"}, "Ray, which assigns GPUs to workers: set cuda"),
        ({"kind": "ray", "device": "xpu:1"}, "Ray, which assigns GPUs to workers: set xpu"),
        ({"kind": "ray", "ray": {"address": "ray://head:10001"}}, "ray job submit"),
        ({"kind": "ray", "ray": {"address": "local"}}, "runtime.kind: local"),
        ({"kind": "ray", "ray": {"gpus": {"judge": 1}}}, "generator"),
        ({"kind": "ray", "ray": {"gpus": {"scorer": -1}}}, "at least 0"),
    ],
)
def test_what_ray_cannot_be_is_refused(runtime, problem):
    with pytest.raises(ConfigError, match=problem):
        RunConfig(student="s", teacher="t", schedule={"epochs": 5}, runtime=runtime)
