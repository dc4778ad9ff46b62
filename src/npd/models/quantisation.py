"""Quantised models: refused as students, allowed as teachers if they can be loaded here.

A student's weights are trained and saved, which a quantised model would quantise again or fail to
save. A teacher is only evaluated, so it may be quantised if its packages are installed.
transformers' own check runs before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from npd.errors import ModelError
from npd.models.device import capability, num_gpus
from npd.models.files import explained

# The package that each method needs besides transformers: (name for pip, import name).
_PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "aqlm": (("aqlm", "aqlm"), ("accelerate", "accelerate")),
    "auto-round": (("auto-round", "auto_round"),),
    "awq": (("gptqmodel", "gptqmodel"), ("accelerate", "accelerate")),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"), ("accelerate", "accelerate")),
    "compressed-tensors": (("compressed-tensors", "compressed_tensors"),),
    "eetq": (("kernels", "kernels"), ("accelerate", "accelerate")),
    "fbgemm_fp8": (("fbgemm-gpu", "fbgemm_gpu"), ("accelerate", "accelerate")),
    "fp8": (("accelerate", "accelerate"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "higgs": (("flute-kernel", "flute"), ("accelerate", "accelerate")),
    "hqq": (("hqq", "hqq"),),
    "mxfp4": (("accelerate", "accelerate"),),
    "mxfp8": (("accelerate", "accelerate"),),
    "quanto": (("optimum-quanto", "optimum.quanto"), ("accelerate", "accelerate")),
    "quark": (("amd-quark", "quark"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"), ("accelerate", "accelerate")),
}
# On a GPU with FP8 units these need kernels; elsewhere transformers falls back to bfloat16.
_BY_KERNELS = ("fp8", "mxfp8")
_KERNELS = ("kernels", "kernels")


def settings_of(config: Any) -> dict[str, Any] | None:
    """The quantisation settings in a transformers config; None if there are none."""
    for owner in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            found = getattr(owner, name, None)
            if found:
                return dict(found if isinstance(found, dict) else found.to_dict())
    return None


def check_trainable(role: str, model: str, config: Any) -> None:
    """Check that the model of `config` is not quantised.

    Raises:
        ModelError: it is quantised.
    """
    settings = settings_of(config)
    if settings is not None:
        raise ModelError(
            f"the {role} {model} is quantised ({_method(settings)}), and npd trains full-precision "
            "weights: give the model it was quantised from, with weights in bfloat16 or float32"
        )


def check_loadable(role: str, model: str, config: Any, device: str) -> None:
    """Check that transformers can load a quantised model on `device`; loads nothing.

    Raises:
        ModelError: a package is missing, the device cannot run it, or the method is unknown.
    """
    settings = settings_of(config)
    if settings is None:
        return
    method = _method(settings)
    remedy = (
        "give the model it was quantised from, or score with a vLLM server (score.engine: vllm, "
        "docs/servers.md)"
    )
    missing = _missing(method, device)
    if missing:
        raise ModelError(
            f"the {role} {model} is quantised ({method}) and needs {' and '.join(missing)}, not "
            f"installed here: run pip install {' '.join(missing)}, {remedy}"
        )
    from transformers.quantizers import AutoHfQuantizer

    what = f"the {role} {model} is quantised ({method}) and cannot be loaded on {device}"
    with explained(what, remedy):
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)


def check_numbers(role: str, model: str, config: Any) -> None:
    """Check that a directory without quantisation settings has no integer weights.

    Reads headers only; loading reports damaged files.

    Raises:
        ModelError: some weights are integers.
    """
    if settings_of(config) is not None:
        return
    for file in sorted(Path(model).glob("*.safetensors")):
        with suppress(OSError, SafetensorError):
            for name, kind in _weights_of(file):
                if kind[0] in "IUB" and kind != "BF16":
                    raise ModelError(
                        f"the {role} {model} stores {name} as {kind}, and its config.json has no "
                        "quantization_config: restore the config.json of these weights"
                    )


def _weights_of(file: Path) -> Iterator[tuple[str, str]]:
    """The names of a file's weights, and their stored types."""
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.endswith(".weight"):
                yield name, str(tensors.get_slice(name).get_dtype())


def _method(settings: dict[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method = settings.get("quant_method", "of an unnamed method")
    return str(getattr(method, "value", method))


def _missing(method: str, device: str) -> list[str]:
    needed = list(_PACKAGES.get(method, ()))
    if method in _BY_KERNELS and _has_narrow_floats(device):
        needed.append(_KERNELS)
    return [package for package, name in needed if not _is_installed(name)]


def _has_narrow_floats(device: str) -> bool:
    """Whether the device is a GPU here with FP8 units."""
    return num_gpus(device) > 0 and (capability(device) or (0, 0)) >= (8, 9)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False
