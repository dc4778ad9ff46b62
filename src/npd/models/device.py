"""The device of a process: which kind, how many, its memory, and how a child is shown a part of it.

Everything goes through `torch.accelerator`, so another kind than CUDA needs no change elsewhere.
What only CUDA, ROCm (which torch calls cuda as well) or another kind has is here too: the variables
that hide devices, the driver's list, the abilities of a GPU. Only CPUs and NVIDIA's GPUs have been
run. Imports torch in functions only, because processes set variables before it is loaded.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from npd.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPU, CUDA = "cpu", "cuda"
# Which variable hides devices from a process, by torch's name of their kind. Kinds without one have
# a single device, or give each process all of them.
_VISIBLE = {
    CUDA: "CUDA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "hpu": "HABANA_VISIBLE_MODULES",
}
# On ROCm this one has precedence. Both are set, because vLLM requires that they agree.
_VISIBLE_ON_ROCM = "HIP_VISIBLE_DEVICES"
# Kinds in the CPU's memory: there is nothing to pin, and torch's counters are not asked.
_IN_MAIN_MEMORY = (CPU, "mps")
# The longest wait for an answer of the driver.
_DRIVER_SECONDS = 60.0
# Where Linux lists AMD's GPUs, in the order of HIP's indices, and their memory.
_KFD, _DRM = Path("/sys/class/kfd/kfd/topology/nodes"), Path("/sys/class/drm")
# Variables that npd has set in this process, which the servers that it starts do not inherit.
OURS = "NPD_SET"
_ALLOCATOR, _ALLOCATOR_BEFORE_2_10 = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


# ---- Which device


def kind_of(device: str) -> str:
    """The kind of a device, as torch names it: `cuda` of `cuda:1`."""
    return device.partition(":")[0]


def is_gpu(device: str) -> bool:
    """Whether a resolved device is anything but the CPU."""
    return kind_of(device) != CPU


def resolve_device(device: str) -> str:
    """`auto` becomes cuda if available, else cpu. Other kinds were never run, so are named."""
    if device != "auto":
        return device
    return CUDA if _accelerator() == CUDA else CPU


def num_gpus(device: str = "auto") -> int:
    """How many devices of the kind of `device` torch can use here."""
    import torch

    kind = kind_of(resolve_device(device))
    return torch.accelerator.device_count() if kind == _accelerator() else 0


def untested(device: str) -> str | None:
    """What to say of a kind of device that npd was never run on; None of the CPU and of CUDA."""
    kind = kind_of(resolve_device(device))
    if kind == CPU or (kind == CUDA and not is_rocm()):
        return None
    name = "ROCm" if kind == CUDA else kind
    return f"tried on CPUs and NVIDIA's GPUs only, never on {name}: check the first steps"


def check_kind(device: str) -> None:
    """Check that torch knows the kind of a device.

    Raises:
        ConfigError: it does not.
    """
    import torch

    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"runtime.device {device}: torch here knows no such kind of device: install the "
            "package that adds it to torch, or set runtime.device: auto"
        ) from error


def _accelerator() -> str | None:
    """The kind of accelerator that torch can use here; it knows one for each build."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def is_rocm() -> bool:
    """Whether torch's cuda is AMD's."""
    import torch

    return torch.version.hip is not None


def capability(device: torch.device | str) -> tuple[int, int] | None:
    """The compute capability of one of NVIDIA's GPUs; None of any other device."""
    import torch

    if torch.device(device).type != CUDA or is_rocm():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def use(device: str) -> None:
    """Make the device that `device` names by number the one that this thread uses.

    Otherwise pinned memory and random numbers would open the first one too.
    """
    index = device.partition(":")[2]
    if index and kind_of(device) == _accelerator():
        import torch

        torch.accelerator.set_device_index(int(index))


def generators_of(device: str) -> dict[str, Any]:
    """The arguments of `torch.random.fork_rng` that save the device's random state."""
    import torch

    if not is_gpu(device):
        return {"devices": []}
    index = torch.accelerator.current_device_index()
    return {"devices": [index], "device_type": kind_of(device)}


def collective_backend(kind: str) -> str:
    """The backends of a process group on devices of `kind`: gloo, and on GPUs their own too.

    Raises:
        ConfigError: torch has none for it.
    """
    import torch.distributed as dist

    if kind == CPU:
        return "gloo"
    try:
        return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    except ValueError as error:
        raise ConfigError(
            f"torch has no collectives for runtime.device {kind}: set train.ranks and score.ranks "
            "to 1, or runtime.device: cpu"
        ) from error


# ---- Copies and memory


def is_pinnable(device: torch.device | str) -> bool:
    """Whether copies to a device come from pinned memory, so that they do not block the host."""
    import torch

    return torch.device(device).type not in _IN_MAIN_MEMORY


def on_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """`tensor` on `device`, without blocking the host until a GPU has finished earlier work."""
    if not is_pinnable(device):
        return tensor.to(device)
    # A copy from pageable memory would block the host.
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished; a CPU has."""
    import torch

    if torch.device(device).type != CPU:
        torch.accelerator.synchronize(torch.device(device))


def free_cached() -> None:
    """Give back what torch's allocator keeps of freed memory, so that other processes can use it.

    Models that refer to themselves are freed first. On a CPU nothing else is done.
    """
    import torch

    gc.collect()
    if (_accelerator() or CPU) not in _IN_MAIN_MEMORY:
        torch.accelerator.empty_cache()


def free_and_total(device: str) -> tuple[int, int] | None:
    """Free and total bytes of a GPU, by torch; None if it cannot tell. Opens the device."""
    import torch

    # torch.accelerator has no such function before 2.10.
    ask = getattr(torch.accelerator, "get_memory_info", None) or getattr(
        torch.get_device_module(kind_of(device)), "mem_get_info", None
    )
    if ask is None:
        return None
    free, total = ask(torch.device(device))
    return int(free), int(total)


def peak_bytes(device: str) -> int:
    """Peak memory: of tensors on a GPU since `reset_peak`, of the whole process elsewhere."""
    import torch

    if kind_of(device) not in _IN_MAIN_MEMORY:
        return int(torch.accelerator.max_memory_allocated(torch.device(device)))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def reset_peak(device: str) -> None:
    """Begin to count a GPU's `peak_bytes` anew; the peak of a process cannot be."""
    import torch

    if kind_of(device) not in _IN_MAIN_MEMORY:
        torch.accelerator.reset_peak_memory_stats(torch.device(device))


@contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """Only deterministic algorithms in this process within the block, if `is_on`.

    Call `set_cublas` before the device is used. Memory is not filled before its first use: what
    npd reads it has written.

    Raises:
        RunError: an operation has no deterministic algorithm on this device.
    """
    if not is_on:
        yield
        return
    import torch

    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = str(error).partition(",")[0]
        raise RunError(
            f"train.deterministic: {what}: set train.deterministic: false (with --resume, too)"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


# ---- What other processes see


def visible_names(device: str = "auto") -> tuple[str, ...]:
    """The GPUs that this process is told of, as the variable that hides the others names them."""
    for variable in _variables(kind_of(resolve_device(device))):
        if (visible := os.environ.get(variable)) is not None:
            return tuple(part.strip() for part in visible.split(",") if part.strip())
    return tuple(map(str, range(num_gpus(device))))


def hides_gpus() -> bool:
    """Whether a variable says which GPUs this process may see."""
    return any(variable in os.environ for variable in _variables(CUDA))


def seeing(gpus: str, device: str = "auto") -> dict[str, str]:
    """The environment in which a process sees these GPUs (names, with commas) and no others."""
    return dict.fromkeys(_variables(kind_of(resolve_device(device))), gpus)


def _variables(kind: str) -> tuple[str, ...]:
    """The variables that hide devices of a kind, the one with precedence first; of CUDA on a CPU.

    Servers and other processes may use GPUs although this process cannot.
    """
    kind = CUDA if kind == CPU else kind
    both = (_VISIBLE_ON_ROCM,) if kind == CUDA and is_rocm() else ()
    return (*both, _VISIBLE[kind]) if kind in _VISIBLE else ()


class DriverGpu(NamedTuple):
    """A GPU that the driver lists: its number, its unique id, and its memory in bytes if known."""

    number: str
    uuid: str
    total: int | None
    free: int | None


def driver_gpus() -> list[DriverGpu]:
    """The GPUs of NVIDIA's or AMD's driver, without opening any; empty where there is neither."""
    return [*_of_nvidia()] or [*gpus_of_kfd()]


def _of_nvidia() -> Iterator[DriverGpu]:
    fields = ("index", "uuid", "memory.total", "memory.free")
    ask = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        row = [part.strip() for part in line.split(",")]
        if len(row) == len(fields):
            total, free = (int(part) * 2**20 if part.isdigit() else None for part in row[2:])
            yield DriverGpu(row[0], row[1], total, free)


def gpus_of_kfd(kfd: Path = _KFD, drm: Path = _DRM) -> Iterator[DriverGpu]:
    """AMD's GPUs, from the kernel's lists. A processor without compute units is no GPU."""
    index = 0
    for node in sorted(kfd.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        found = _properties(node / "properties")
        if not int(found.get("simd_count", "0")):
            continue
        memory = drm / f"renderD{found.get('drm_render_minor', '')}" / "device"
        total, used = (_number(memory / f"mem_info_vram_{what}") for what in ("total", "used"))
        free = None if total is None or used is None else total - used
        uuid = f"GPU-{int(found.get('unique_id', '0')):016x}"
        yield DriverGpu(str(index), uuid, total, free)
        index += 1


def _properties(file: Path) -> dict[str, str]:
    """Names and numbers of a list in the kernel's format; empty if it may not be read."""
    try:
        return dict(re.findall(r"^(\w+) (\d+)$", file.read_text(), re.MULTILINE))
    except OSError:
        return {}


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


# ---- What a process sets for itself before torch is loaded


def set_variables(device: str, *, is_deterministic: bool) -> None:
    """Set the variables of a worker process that torch and cuBLAS read once; keeps a user's own.

    Segments that grow let rows of any length use the memory that others have freed.
    """
    if is_gpu(device) and not {_ALLOCATOR, _ALLOCATOR_BEFORE_2_10} & set(os.environ):
        _set(_allocator_variable(metadata.version("torch")), "expandable_segments:True")
    if is_deterministic:
        set_cublas()


def set_cublas() -> None:
    """Let cuBLAS give the same products each time. It reads the variable at its first use.

    Raises:
        ConfigError: the variable is set to something that does not give that.
    """
    given = os.environ.get(_CUBLAS)
    if given is None:
        _set(_CUBLAS, ":4096:8")
    elif given not in (":4096:8", ":16:8"):
        raise ConfigError(
            f"train.deterministic needs {_CUBLAS}=:4096:8 or :16:8, and it is {given}: unset it"
        )


def _set(name: str, value: str) -> None:
    ours = [other for other in os.environ.get(OURS, "").split(",") if other]
    os.environ |= {name: value, OURS: ",".join([*ours, name])}


def _allocator_variable(version: str) -> str:
    major, minor = map(int, version.split(".")[:2])
    return _ALLOCATOR if (major, minor) >= (2, 10) else _ALLOCATOR_BEFORE_2_10


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what `set_variables` added: for servers, which choose their own."""
    ours = {OURS, *environment.get(OURS, "").split(",")}
    return {name: value for name, value in environment.items() if name not in ours}
