"""Devices: which kind, what processes see of them, what drivers tell, and determinism.

There is no GPU here, so what torch does on one is not tested; what npd decides is.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from npd.config import LossConfig, RunConfig, TrainConfig
from npd.errors import ConfigError, RunError
from npd.models import device
from npd.train.trainer import Trainer
from test_trainer import make_rollouts, refs_of, score, segment_of
from test_trainer import teacher as teacher

HAS_GPU = torch.accelerator.is_available()
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", device.OURS)
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def environment(monkeypatch):
    """The process's environment, without the variables of devices."""
    for name in (*VARIABLES, *ALLOCATORS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return os.environ


@pytest.fixture
def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")


@pytest.mark.skipif(HAS_GPU, reason="this machine has an accelerator")
def test_a_machine_without_gpus():
    assert device.resolve_device("auto") == "cpu"
    assert device.resolve_device("xpu:1") == "xpu:1"
    assert [device.num_gpus(name) for name in ("auto", "cpu", "cuda", "xpu")] == [0, 0, 0, 0]
    assert device.visible_names() == ()
    device.use("cuda:1")
    device.free_cached()
    device.reset_peak("cpu")
    device.synchronize("cpu")
    assert 2**20 < device.peak_bytes("cpu") < 2**50


@pytest.mark.parametrize("name", ["npu", "npu:1", "foo"])
def test_kinds_that_torch_does_not_know_are_refused(name):
    with pytest.raises(ConfigError, match=f"runtime.device {name}: torch here knows no such kind"):
        device.check_kind(name)
    device.check_kind("xpu:0")


def test_what_was_never_run_is_said(rocm):
    assert device.untested("cpu") is None
    assert "never on xpu" in device.untested("xpu:0")
    assert "never on ROCm" in device.untested("cuda")


def test_what_was_run_is_not():
    assert device.untested("cuda:0") is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", "gloo"),
        ("cuda", "cpu:gloo,cuda:nccl"),
        ("xpu", "cpu:gloo,xpu:xccl"),
    ],
)
def test_collectives_are_those_of_the_kind(kind, expected):
    assert device.collective_backend(kind) == expected


def test_a_kind_without_collectives_has_no_ranks():
    with pytest.raises(ConfigError, match=r"no collectives for runtime\.device vulkan"):
        device.collective_backend("vulkan")


def test_processes_are_shown_gpus_by_the_variable_of_the_kind(environment):
    assert device.seeing("3,4", "cuda") == {"CUDA_VISIBLE_DEVICES": "3,4"}
    assert device.seeing("", "cpu") == {"CUDA_VISIBLE_DEVICES": ""}
    assert device.seeing("1", "npu") == {"ASCEND_RT_VISIBLE_DEVICES": "1"}
    assert device.seeing("0", "mps") == {}
    environment["ZE_AFFINITY_MASK"] = "2, 5"
    assert device.visible_names("xpu") == ("2", "5")
    assert not device.hides_gpus()


def test_on_rocm_its_own_variable_has_precedence(environment, rocm):
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"
    assert device.visible_names("cuda") == ("0", "1")
    environment["HIP_VISIBLE_DEVICES"] = "7"
    assert device.visible_names("cuda") == ("7",)
    both = {"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "2"}
    assert device.seeing("2", "cuda") == both
    assert device.capability("cuda:0") is None


def node(folder, number, **properties):
    place = folder / "kfd" / str(number)
    place.mkdir(parents=True)
    lines = "".join(f"{name} {value}\n" for name, value in properties.items())
    (place / "properties").write_text(lines)


def vram(folder, minor, **numbers):
    place = folder / "drm" / f"renderD{minor}" / "device"
    place.mkdir(parents=True)
    for what, number in numbers.items():
        (place / f"mem_info_vram_{what}").write_text(f"{number}\n")


def test_amds_gpus_and_their_memory_are_the_kernels(tmp_path):
    """In the order of the nodes as numbers, of which processors and what is hidden are none."""
    node(tmp_path, 0, simd_count=0, cpu_cores_count=64)
    node(tmp_path, 10, simd_count=304, unique_id=255, drm_render_minor=129)
    node(tmp_path, 2, simd_count=304, unique_id=16, drm_render_minor=128)
    node(tmp_path, 3)
    node(tmp_path, 11, simd_count=304, drm_render_minor=130)
    vram(tmp_path, 128, total=1000, used=100)
    vram(tmp_path, 129, total=2000, used=0)
    assert [*device.gpus_of_kfd(tmp_path / "kfd", tmp_path / "drm")] == [
        ("0", "GPU-0000000000000010", 1000, 900),
        ("1", "GPU-00000000000000ff", 2000, 2000),
        ("2", "GPU-0000000000000000", None, None),
    ]
    assert [*device.gpus_of_kfd(tmp_path / "nowhere", tmp_path)] == []


# What a worker sets for itself.


def test_a_workers_allocator_has_segments_that_grow(environment):
    device.set_variables("cuda:0", is_deterministic=False)
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment
    # Of servers only their own settings are.
    assert not {"PYTORCH_ALLOC_CONF", device.OURS} & set(device.without_ours(environment))
    assert device.without_ours({"A": "1"}) == {"A": "1"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_allocator_stays(environment, name):
    environment[name] = "max_split_size_mb:64"
    device.set_variables("cuda", is_deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    found = {key: value for key, value in environment.items() if key.endswith("ALLOC_CONF")}
    assert found == {name: "max_split_size_mb:64"}
    assert device.without_ours(environment)[name] == "max_split_size_mb:64"


def test_a_users_own_workspace_stays(environment):
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    device.set_variables("cpu", is_deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert not {"PYTORCH_ALLOC_CONF", device.OURS} & set(environment)


@pytest.mark.parametrize(
    ("version", "name"),
    [("2.9.1", ALLOCATORS[1]), ("2.10.0+cu128", ALLOCATORS[0]), ("2.13.0a0+git", ALLOCATORS[0])],
)
def test_older_releases_of_torch_have_another_name_for_it(version, name):
    assert device._allocator_variable(version) == name


PROGRAM = """
import os, pickle, sys
from npd.config import RunConfig
factory = pickle.loads(sys.stdin.buffer.read())
assert "torch" not in sys.modules, "torch reads its variables as it is loaded"
try:
    factory()
except Exception:
    pass
print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"kind": "local", "device": "cuda"}, "expandable_segments:True :4096:8"),
        ({"kind": "local", "device": "auto"}, "None :4096:8"),  # there is no GPU
        ({"kind": "ray"}, "expandable_segments:True :4096:8"),
        ({"kind": "inline"}, "None None"),  # the user's own process
    ],
)
def test_workers_set_their_variables_before_torch_is_there(tmp_path, runtime, expected):
    import pickle

    from npd.workers import Factory

    config = RunConfig(student="s", teacher="t", train={"deterministic": True}, runtime=runtime)
    clean = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, *ALLOCATORS)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=pickle.dumps(Factory("generator", config, tmp_path)),
        capture_output=True,
        env=clean,
        check=True,
    )
    assert done.stdout.decode().split("\n")[-2] == expected


# Determinism.


def test_deterministic_algorithms_are_for_the_block():
    assert not torch.are_deterministic_algorithms_enabled()
    with device.deterministic(is_on=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with device.deterministic(is_on=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_deterministic_algorithm_is_one_line():
    says = "put_ does not have a deterministic implementation: set train.deterministic: false"
    with pytest.raises(RunError, match=says) as caught, device.deterministic(is_on=True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert len(str(caught.value)) < 300
    with pytest.raises(RuntimeError, match="size of tensor"), device.deterministic(is_on=True):
        torch.zeros(3) + torch.zeros(2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_it_changes_no_digit(tiny_model_dir, teacher, dtype):
    samples = [score(teacher, rollout) for rollout in make_rollouts()]
    by_id = {ref.sample_id: s for ref, s in zip(refs_of(samples), samples, strict=True)}

    def trained(is_on):
        trainer = Trainer(
            TrainConfig(dtype=dtype, row_tokens=512, deterministic=is_on),
            LossConfig(),
            student=tiny_model_dir,
            read=lambda ref: by_id[ref.sample_id],
            device="cpu",
        )
        report = trainer.train(segment_of(samples, [list(range(len(samples)))], steps=3))
        steps = [replace(step, seconds=0.0) for step in report.steps]
        return steps, {name: p.detach() for name, p in trainer.model.named_parameters()}

    steps, weights = trained(True)
    expected, others = trained(False)
    assert steps == expected
    assert all(torch.equal(weights[name], other) for name, other in others.items())
