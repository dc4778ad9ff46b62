"""The Triton kernels of the loss: interpreted, compiled for GPUs that are not here, and missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npd.train import loss as module
from npd.train.loss import near_policy_loss
from test_loss import make_case, run

HERE = Path(__file__).parent

COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from npd.models.kernels import row_stats as stats
from npd.train import triton_passes as fused

for is_wide in (False, True):
    constants = {
        "WIDTH": 151_936, "SCALE": 0.5, "SOFTCAP": 30.0, "HAS_BIAS": is_wide,
        "HAS_SOFTCAP": is_wide, "NOTHING": -1e30, "TYPE": tl.float32, "BLOCK": 4096,
    }
    logits = "*fp32" if is_wide else "*bf16"
    rows = {
        stats._row_stats: {"top_out": "*fp32", "total_out": "*fp32", "moment_out": "*fp32",
                           "maxima_out": "*fp32"},
        fused._write_grads: {"log_sums": "*fp32", "outside": "*fp32", "labels": "*i64",
                        "label_slopes": "*fp32"},
    }
    for kernel, types in rows.items():
        own = constants
        if kernel is stats._row_stats:  # of the scorer, and of the loss
            own = constants | {"GROUP": 64 if is_wide else 1, "HAS_MAXIMA": is_wide}
        signature = {"logits": logits, **types, "bias": logits}
        signature |= dict.fromkeys(own, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in own.items()}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert ".entry" in made.asm["ptx"]
        assert ".local" not in made.asm["ptx"], "registers spilled"
"""


def run_python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_are_the_chunked_loss():
    pytest.importorskip("triton")
    said = run_python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        HERE / "triton_cases.py",
        TRITON_INTERPRET="1",
    )
    assert "passed" in said


def test_kernels_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    run_python(script, TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0")


@pytest.mark.parametrize("is_there", [False, True])
def test_without_kernels_it_is_chunked_and_says_so_once(is_there, caplog, monkeypatch):
    if is_there:
        pytest.importorskip("triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
        for name in ("npd.train.triton_passes", "npd.models.kernels.row_stats"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.delattr(name, raising=False)
    module._fall_back.cache_clear()
    case = make_case(4, 11, 3)
    want = run(*case, impl="chunked")
    for _ in range(2):
        torch.testing.assert_close(run(*case, impl="triton"), want, atol=0, rtol=0)
    (said,) = caplog.messages
    reason = "triton has no kernels for cpu" if is_there else "triton cannot be imported"
    assert reason in said
    assert "so loss.impl chunked is used" in said


def test_an_unknown_implementation_is_refused():
    with pytest.raises(AssertionError, match="fast"):
        near_policy_loss(*make_case(4, 11, 3), impl="fast")


def test_auto_takes_kernels_where_they_can_be_built(monkeypatch, caplog):
    """On a GPU with a compiler; elsewhere the plain passes, without a word."""
    from npd.errors import ConfigError
    from npd.models.kernels import compile as compiling
    from npd.train import loss
    from npd.train.logits_passes import TorchPasses
    from npd.train.triton_passes import TritonPasses

    gpu = torch.device("cuda")

    def passes(capability=9, compiler=True):
        def check(device):
            if not compiler:
                raise ConfigError("no compiler")

        compiling.builds_kernels.cache_clear()
        monkeypatch.setattr(compiling, "check_compilers", check)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        return type(loss._passes("auto", gpu))

    assert passes() is TritonPasses
    assert passes(capability=6) is TorchPasses
    assert passes(compiler=False) is TorchPasses
    assert type(loss._passes("auto", torch.device("cpu"))) is TorchPasses
    assert type(loss._passes("chunked", gpu)) is TorchPasses
    compiling.builds_kernels.cache_clear()
    assert not caplog.records
