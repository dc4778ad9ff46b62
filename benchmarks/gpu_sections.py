"""The sections of `gpu_measure.py`: each measures one thing and says its lines.

A section is a function of a `Meter`, stands alone, and leaves nothing behind but the meter's
student. It begins with what tells the most. What is marked CUDA never ran.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench_generate import build_asks
from bench_score import bare_pass, make_rollouts, packed_rows
from common import ROOT, SHAPES, free, llama_config, random_model
from gpu_meter import ROW_TOKENS, Meter
from npd.config import ScoreConfig
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.models import lm_head
from npd.models.kernels.compile import compile_layers, uncompiled
from npd.models.loading import load_model
from npd.models.out_of_memory import Fitting
from npd.models.packed_attention import Boundaries, packed_attention, varlen_kernel
from npd.score import in_process
from npd.score.scorer import TeacherStudentScorer
from npd.store.snapshots import publish, verify
from npd.train import chunked
from npd.train.batch import build_row
from npd.train.fsdp import gather
from npd.train.loss import near_policy_loss
from training import TOP_K, matmul_rate, step_flops

COPIED = 2**30  # float32 values


def rates(meter: Meter) -> None:
    """The rate of matrix products, and the bandwidth of a copy."""
    figures: dict[str, Any] = {"copy_tb_s": None, "gpu": "cpu"}
    if meter.is_cuda:  # CUDA
        values = torch.empty(COPIED, device="cuda", dtype=torch.float32)
        moved = 2 * values.nbytes  # read and written
        figures["copy_tb_s"] = moved / meter.seconds(values.clone) / 1e12
        figures["gpu"] = torch.cuda.get_device_name()
    rate = matmul_rate(meter.device, "bfloat16", "wall")
    meter.say("rates", matmul_tflops=rate / 1e12, **figures, torch=torch.__version__)


# -- Training ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A step: on long documents or on few tokens, in rows of that size, with that loss."""

    name: str
    is_long: bool
    row_tokens: int
    loss: dict[str, Any]
    is_profiled: bool = False


KERNELS = {"impl": "triton"}
WIDE = {"impl": "triton", "chunk": 4096}
EAGER = (
    Case("A eager, chunked", False, ROW_TOKENS, {"impl": "chunked"}, True),
    Case("B eager, triton", False, ROW_TOKENS, KERNELS),
    Case("C eager, triton, chunk 4096", False, ROW_TOKENS, WIDE, True),
    Case("D the same, long documents", True, ROW_TOKENS, WIDE),
    Case("E the same, rows of 16k", True, 2 * ROW_TOKENS, WIDE),
)
FIRST_COMPILED = Case("F compiled", False, ROW_TOKENS, WIDE, True)
COMPILED = (
    Case("G compiled, rows of 16k", True, 2 * ROW_TOKENS, WIDE),
    Case("H compiled, rows of 32k", False, 4 * ROW_TOKENS, WIDE),
)


def train(meter: Meter) -> None:
    """Steps of the student, eager and then compiled."""
    rate = matmul_rate(meter.device, "bfloat16", "wall")
    for case in EAGER:
        _train(meter, case, rate)
    meter.student.compile()
    started = time.perf_counter()
    _train(meter, FIRST_COMPILED, rate)
    meter.say("train", case="compile and its steps", seconds=time.perf_counter() - started)
    for case in COMPILED:
        _train(meter, case, rate)


def _train(meter: Meter, case: Case, rate: float) -> None:
    student = meter.student
    count = student.long if case.is_long else student.few
    segment, samples = student.segment(count, case.row_tokens, case.loss), student.samples[count]
    if meter.is_cuda:  # CUDA
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        student.trainer.train(segment)

    seconds = meter.seconds(step, repeats=2)
    tokens = sum(sample.rollout.num_tokens for sample in samples)
    flops = step_flops(llama_config(meter.layers, shape=meter.shape), samples)
    figures: dict[str, Any] = {
        "docs": count,
        "rows": len(segment.steps[0].ranks[0]),
        "divisor": student.divisor,
        "tok_s": tokens / seconds,
        "mfu": flops / seconds / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if meter.is_cuda else 0,
    }
    if case.is_profiled and meter.is_cuda:  # CUDA
        figures["profile"] = meter.profile(step)
    meter.say("train", case=case.name, **figures)


# -- The loss ------------------------------------------------------------------------------------


def loss(meter: Meter) -> None:
    """The loss alone, forward and backward; and with the sum of the head's gradient as it was."""
    one = _loss_of(meter)
    for chunk in (1024, 2048, 4096, 8192):
        spent = meter.seconds(lambda chunk=chunk: one(impl="triton", chunk=chunk))
        meter.say("loss", impl="triton", chunk=chunk, ms=1e3 * spent)
    now = one(impl="triton", chunk=4096)
    with patch.object(chunked, "has_wide_products", _has_none):
        for chunk in (1024, 4096):
            spent = meter.seconds(lambda chunk=chunk: one(impl="triton", chunk=chunk))
            off = (one(impl="triton", chunk=chunk) - now).norm() / now.norm()
            what = "triton, narrow sums"
            meter.say("loss", impl=what, chunk=chunk, ms=1e3 * spent, off=off.item())
    if not meter.is_cuda:
        return
    # CUDA
    profile = meter.profile(lambda: one(impl="triton", chunk=4096))
    meter.say("loss", impl="triton 4096", profile=profile)
    spent = meter.seconds(lambda: one(impl="triton", kd_weight=0.0))
    meter.say("loss", impl="triton, ce only", ms=1e3 * spent)
    meter.say("loss", impl="liger", ms=1e3 * meter.seconds(lambda: one(impl="liger")))


def _has_none(_: Tensor) -> bool:
    """As on a device whose products of bfloat16 are bfloat16."""
    return False


def _loss_of(meter: Meter) -> Callable[..., Tensor]:
    """A function of the loss's options that gives the head's gradient."""
    num, width, vocab = (64, 64, 1000) if meter.is_quick else (16384, 1536, 151936)
    device = meter.device
    hidden = torch.randn(num, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=device) / width**0.5
    labels = torch.randint(vocab, (num,), device=device)
    ids = (labels[:, None] + torch.arange(TOP_K, device=device) * (vocab // TOP_K)) % vocab
    # A little mass is left for the tail.
    logprobs = torch.randn(num, TOP_K, device=device).log_softmax(-1) - 0.05

    def one(impl: str, **options: Any) -> Tensor:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        if impl == "liger":
            _liger(*leaves, labels).backward()
        else:
            out = near_policy_loss(*leaves, labels, ids, logprobs, impl=impl, **options)
            out.loss.backward()
        assert leaves[1].grad is not None
        return leaves[1].grad

    return one


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CUDA: Liger's cross-entropy."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight.to(hidden.dtype), labels)
    return out[0] if isinstance(out, tuple) else out


# -- Scoring -------------------------------------------------------------------------------------


def score(meter: Meter) -> None:
    """Teachers of two sizes, in rows of two sizes, with reads of two kinds; then compiled."""
    for shape in (meter.shape,) if meter.is_quick else ("qwen2.5-1.5b", "qwen2.5-7b"):
        _score(meter, shape)
        free()


def _score(meter: Meter, shape: str) -> None:
    with tempfile.TemporaryDirectory(dir=meter.room) as folder:
        given = random_model(meter.layers, "bfloat16", shape=shape, device=meter.device)
        given.save_pretrained(folder)
        del given
        model = load_model(folder, dtype="bfloat16", device=meter.device)
    rollouts = make_rollouts(8 if meter.is_quick else 128, 64, 16 if meter.is_quick else 384)
    pairs = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    for row_tokens in (4096, 16384):
        _reads(meter, model, shape, row_tokens, rollouts, pairs)
    _, run = _scoring(model, shape, 16384, 2048, rollouts)
    if meter.is_cuda:  # CUDA
        meter.say("score", shape=shape, profile=meter.profile(run))
    if shape != meter.shape:  # compiling takes its time, and is told by one model
        return
    compile_layers(model, meter.device, "score.compile")
    spent = meter.seconds(run, repeats=2)
    tokens = sum(batch.cu_seqlens[-1] for batch, _ in packed_rows(pairs, 16384, meter.device))
    meter.say("score", shape=shape, row_tokens=16384, compiled={"tok_s": tokens / spent})


def _reads(
    meter: Meter, model: Any, shape: str, row_tokens: int, rollouts: Any, pairs: Any
) -> None:
    """A bare pass, and scoring with logits read once in float32, or as it was."""
    rows = packed_rows(pairs, row_tokens, meter.device)
    tokens = sum(batch.cu_seqlens[-1] for batch, _ in rows)
    bare = meter.seconds(lambda: bare_pass(model, rows, everywhere=False), repeats=2)
    figures: dict[str, Any] = {"bare": tokens / bare}
    for name, impl in (("now", "auto"), ("before", "torch")):
        products = lm_head.has_wide_products if name == "now" else _has_none
        for chunk in (512, 2048):
            teacher, run = _scoring(model, shape, row_tokens, chunk, rollouts, impl)
            with patch.object(lm_head, "has_wide_products", products):
                spent = meter.seconds(run, repeats=2)
            figures[f"{name}, chunk {chunk}"] = {
                "tok_s": tokens / spent,
                "of_bare": bare / spent,
                "divisor": teacher._fitting.divisor,
            }
    meter.say("score", shape=shape, row_tokens=row_tokens, **figures)


def _scoring(
    model: Any, shape: str, row_tokens: int, chunk: int, rollouts: Any, impl: Any = "auto"
) -> tuple[in_process.PrefillModel, Callable[[], object]]:
    config = ScoreConfig(row_tokens=row_tokens, head_chunk=chunk)
    teacher = in_process.PrefillModel(model, "teacher", SHAPES[shape][0], config, impl)
    scorer = TeacherStudentScorer(
        teacher, lambda _: teacher, top_k=TOP_K, needs_ifd=False, needs_student_pass=False
    )
    return teacher, lambda: scorer.score(rollouts)


# -- Decoding ------------------------------------------------------------------------------------

PROFILED_ROWS = 128


def decode(meter: Meter) -> None:
    """A step of npd's loop at some batch sizes, then continuous batching."""
    model = _decoder(meter)
    for rows in (2,) if meter.is_quick else (32, PROFILED_ROWS, 256):
        _decode(meter, model, rows)
    if meter.is_cuda:  # CUDA
        _generate_batch(meter, model)


def _decoder(meter: Meter) -> Any:
    return meter.random_model(eos_token_id=None, pad_token_id=0)


def _decode(meter: Meter, model: Any, rows: int) -> None:
    asks = build_asks(rows, *((8, 16) if meter.is_quick else (256, 384)))
    fitting = Fitting("a batch of", rows, "measure fewer rows")

    def write(count: int) -> None:
        sampling = Sampling(count, frozenset(), 0, batch_size=rows)
        generate_with(model, asks, sampling, limits=[count] * rows, fitting=fitting)

    # The prompts' part is in both, and so in neither's difference.
    few, many = (2, 6) if meter.is_quick else (8, 72)
    spent = [meter.seconds(lambda count=count: write(count), repeats=1) for count in (few, many)]
    step = (spent[1] - spent[0]) / (many - few)
    figures: dict[str, Any] = {"ms_a_step": 1e3 * step, "tok_s": rows / step}
    if meter.is_cuda and rows == PROFILED_ROWS:  # CUDA
        figures["profile"] = meter.profile(lambda: write(few))
    meter.say("decode", rows=rows, divisor=fitting.divisor, **figures)


def _generate_batch(meter: Meter, model: Any) -> None:
    """CUDA: transformers' continuous batching, its first call included."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [ask.prompt.prompt_ids.tolist() for ask in build_asks(256, 256, 384)]
    settings = GenerationConfig(
        max_new_tokens=128, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(return_logprobs=True)
    started = time.perf_counter()
    out = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=batching
    )
    seconds = time.perf_counter() - started
    tokens = sum(len(found.generated_tokens) for found in out.values())
    speed = {"first_call_s": seconds, "tok_s": tokens / seconds}
    meter.say("decode", engine="generate_batch", **speed)


def decode_for(meter: Meter, seconds: float) -> None:
    """Decode so long, after a line that says who does."""
    model = _decoder(meter)
    asks = build_asks(2 if meter.is_quick else 64, 8, 16)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sampling = Sampling(32, frozenset(), 0, batch_size=len(asks))
        generate_with(model, asks, sampling, limits=[32] * len(asks))


# -- What is exact -------------------------------------------------------------------------------

# Documents of 1, 69, 20, 129 and 1,000 tokens.
BOUNDS = (0, 1, 70, 90, 219, 1219)
LONGEST = 1000
HEAD_SIZES = (64, 80, 96, 128, 160, 192, 256)
# What a kernel says that does not take its inputs.
REFUSALS = (RuntimeError, ValueError, TypeError)


def exact(meter: Meter) -> None:
    """Kernels beside float32, and what the documentation promises of equal steps."""
    for size in HEAD_SIZES:
        _attention(meter, size)
    if meter.is_cuda:  # CUDA
        _grouped_queries(meter)
    _same_step(meter)
    if meter.is_cuda:  # CUDA
        _kernel_cases(meter)


def _attention(meter: Meter, size: int) -> None:
    """How far output and gradients in bfloat16 are from those in float32."""
    torch.manual_seed(0)
    shapes = [(1, heads, BOUNDS[-1], size) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device=meter.device) for shape in shapes]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        bounds = Boundaries(BOUNDS)
        try:
            out, _ = packed_attention(torch.nn.Module(), *leaves, None, cu_seqlens=bounds)
            out.float().square().sum().backward()
        except REFUSALS as error:
            meter.say("exact", head=size, dtype=str(dtype), error=str(error)[:200])
            return
        found.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)]
    meter.say("exact", head=size, off=off)


def _grouped_queries(meter: Meter) -> None:
    """CUDA: whether the kernel takes fewer keys than queries as they are."""
    kernel = varlen_kernel()
    if kernel is None:
        return
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    q, k, v = (
        torch.randn(BOUNDS[-1], heads, 128, device="cuda", dtype=torch.bfloat16)
        for heads in (12, 2, 2)
    )
    where = (bounds, bounds, LONGEST, LONGEST)
    repeated = [tensor.repeat_interleave(6, dim=1) for tensor in (k, v)]
    has_option = "enable_gqa" in inspect.signature(kernel).parameters
    options = {"enable_gqa": True} if has_option else {}
    try:
        out = kernel(q, k, v, *where, window_size=(-1, 0), **options)
        whole = kernel(q, *repeated, *where, window_size=(-1, 0))
        found: bool | str = torch.allclose(out, whole, atol=1e-2)
    except REFUSALS as error:
        found = str(error)[:200]
    meter.say("exact", gqa_as_it_is=found)


def _same_step(meter: Meter) -> None:
    """Whether a row's gradient is the same twice, as it is and in deterministic mode."""
    student = meter.student
    student.segment(student.few)
    trainer, samples = student.trainer, student.samples[student.few]
    row = build_row(samples[: 4 if meter.is_quick else 40], version=0, device=meter.device)

    def grads() -> Tensor:
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer._objective(row, 100)[0].backward()
        return torch.cat([gather(p.grad).flatten()[::997] for p in trainer._parameters])

    def is_same() -> bool:
        return torch.equal(grads(), grads())

    with uncompiled():
        meter.say("exact", same_step_twice=is_same(), seconds=meter.seconds(grads))
        if meter.is_cuda:  # CUDA
            try:
                with _deterministic():
                    meter.say("exact", deterministic=is_same(), seconds=meter.seconds(grads))
            except RuntimeError as error:
                meter.say("exact", deterministic=str(error)[:200])
    trainer.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _deterministic() -> Iterator[None]:
    """CUDA: torch's deterministic algorithms within the block."""
    settings = torch.utils.deterministic
    with (
        patch.dict(os.environ, CUBLAS_WORKSPACE_CONFIG=":4096:8"),
        patch.object(settings, "fill_uninitialized_memory", False),
    ):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def _kernel_cases(meter: Meter) -> None:
    """CUDA: the cases of the kernels' tests, in this process: another one takes 15 s to start."""
    cases = str(ROOT / "tests" / "triton_cases.py")
    for which in ("not gradcheck and not float64", "gradcheck"):
        meter.say("exact", triton_cases=which, rc=run_cases(cases, which))


def run_cases(path: str, which: str) -> int:
    """The exit code of the tests in that file that `which` selects.

    The project's pytest options are left out, because the plugins they are for may be missing.
    """
    import pytest

    plugins = [word for name in ("cacheprovider", "xdist", "benchmark") for word in
               ("-p", f"no:{name}")]  # fmt: skip
    options = ["-q", "-x", "-o", "addopts=", "-W", "ignore", *plugins]
    return int(pytest.main([*options, "-k", which, path]))


# -- Neighbours and disks ------------------------------------------------------------------------

DECODE_SECONDS = 40.0


def neighbours(meter: Meter) -> None:
    """One device for two processes: a step while another process decodes."""
    student = meter.student
    segment = student.segment(student.few)
    script = Path(__file__).with_name("gpu_measure.py")
    command = [sys.executable, script, "--device", meter.device, *(["--quick"] * meter.is_quick)]
    command += ["--decode-loop", str(DECODE_SECONDS)]

    def step() -> None:
        student.trainer.train(segment)

    with uncompiled():
        alone = meter.seconds(step, repeats=2)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout is not None
                ready = json.loads(other.stdout.readline())
                both = meter.seconds(step, repeats=2, warm_up=0)
                is_decoding = other.poll() is None
            finally:
                other.terminate()
    figures = {"alone_s": alone, "beside_decoding_s": both, "slower": both / alone}
    meter.say("neighbours", **figures, still_decoding=is_decoding, **ready)


def disk(meter: Meter) -> None:
    """Seconds of a checkpoint, of the first snapshot, and of its check."""
    student = meter.student
    trainer = student.trainer
    if trainer.last_step is None:  # a checkpoint holds AdamW's moments
        trainer.train(student.segment(student.few))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, snapshot = Path(folder, "step-000001"), Path(folder, "v000001")
        for what, run in (
            ("checkpoint", lambda: trainer.save_checkpoint(checkpoint)),
            ("snapshot", lambda: publish(snapshot, trainer.save_snapshot)),
            ("verify", lambda: verify(snapshot)),
        ):
            spent = meter.seconds(run, repeats=1, warm_up=0)
            meter.say("disk", what=what, seconds=spent)
