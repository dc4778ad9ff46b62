"""`examples/loop.py` and the library are one algorithm: same samples, verdicts, losses, weights.

Three things stand between the two and exact equality. The library stores the teacher's top-k
log-probs as float16 (npd.store.shards); where weights are compared, the example's are rounded alike
here. A snapshot is rounded to bfloat16, so that float noise, which every processor has its own of,
moves a weight next to a rounding edge by 0.4 %, and with it what is sampled: the example's snapshot
is compared with the library's, then replaced by it. And Adam takes a whole step for a gradient that
is all but zero: such weights are few, and are let move by twice a step. With weights perturbed by
1e-6 (ten times float noise) every bound below held for seeds 0 to 7.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import npd
from npd.config import FilterConfig
from npd.filters import DeltaIfd, delta_ifd
from npd.schedule.requests import hash64
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts, read_scored
from npd.types import FinishReason, Outcome, SampleStats
from tiny_model import save_model
from tiny_run import tiny_config, write_prompts

EXAMPLE = Path(__file__).parents[1] / "examples" / "loop.py"
NUM_PROMPTS = 20
SEED = 1
LR = 3e-4
CLIP = 0.5  # among the gradient norms, which are 0.41 to 0.86
# Cuts on both sides, and one sample that only `min_nll` keeps; no Δ-IFD is within 0.006 of a bound.
FILTER = {"low": 0.03, "tolerance": 0.02, "high": 0.2, "min_nll": 5.7}
NLLS = ("nll_teacher", "nll_teacher_alone", "nll_student", "nll_student_alone")


class SilentView:
    """A view that shows nothing."""

    def update(self, state):
        """Nothing."""

    def message(self, text):
        """Nothing."""

    def close(self):
        """Nothing."""


@dataclass(frozen=True)
class Both:
    """What the example (samples, (loss, drift) of each step, weights) and the library made."""

    samples: list[Any]
    steps: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    run: npd.RunResult

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.run.directory)

    def library_samples(self, read, place: Path) -> dict[int, Any]:
        records = [record for path in sorted(place.parent.glob("*.arrow")) for record in read(path)]
        return {getattr(record, "rollout", record).sample_id: record for record in records}

    def library_kept(self) -> set[int]:
        with Ledger.reader(self.layout.ledger_db) as ledger:
            rows = ledger.samples()
        return {row.sample_id for row in rows if row.outcome is not Outcome.REJECTED}


@pytest.fixture
def loop():
    """The example as a module of its own, for each test anew."""
    spec = importlib.util.spec_from_file_location("example_loop", EXAMPLE)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a teacher that belong to SEED."""
    root = tmp_path_factory.mktemp("models")
    student = save_model(root / "student", seed=2 * SEED)
    return student, save_model(root / "teacher", seed=2 * SEED + 1, layers=3)


def round_as_stored(score):
    """The example's score(), its top-k log-probs through float16 as the library's shards do it."""

    def rounded(teacher, gen, row, *rest):
        score(teacher, gen, row, *rest)
        for x in row:
            half = x.topk_logprobs.half().double()
            mass, kept = (y.double().exp().sum(-1, keepdim=True) for y in (x.topk_logprobs, half))
            x.topk_logprobs = half.float() + (mass / kept).log().float()

    return rounded


def by_snapshots_of(run, generate):
    """The example's generate() by the library's snapshots, each compared with the example's own."""
    met: list[Any] = []

    def generated(gen, *rest):
        if not any(known is gen for known in met):
            met.append(gen)
            if len(met) > 1:  # the first is the start of both
                take_snapshot(gen, RunLayout(run.directory).snapshot(len(met) - 1))
        generate(gen, *rest)

    return generated


def take_snapshot(gen, folder: Path) -> None:
    """Load the library's snapshot into `gen`, which is the same but for weights next to an edge."""
    theirs = load_file(folder / "model.safetensors")
    num_moved = num_weights = 0
    for name, weight in gen.named_parameters():
        published = theirs[name].float()
        # Neighbours in bfloat16 are up to 2^-7 apart; float noise itself moves those around zero.
        torch.testing.assert_close(weight.data, published, rtol=2**-7, atol=1e-5)
        num_moved += (weight.data != published).sum().item()
        num_weights += published.numel()
        weight.data = published
    assert num_moved < 0.01 * num_weights


def run_both(loop, models, tmp_path, *, seed=SEED, epochs=4, refresh_at=(2,), **changes) -> Both:
    """The same settings through both."""
    student_dir, teacher_dir = models
    prompts = write_prompts(tmp_path / "prompts.jsonl", NUM_PROMPTS)
    settings = loop.Settings(
        epochs=epochs, reuse=2, refresh_at=refresh_at, top_k=8, lr=LR, min_lr=LR / 10, seed=seed,
        weight_decay=0.1, clip=CLIP, batch_size=6, bf16=False,
        **{"max_new_tokens": 12, "drop_truncated": False, "row_tokens": 128} | changes,
    )  # fmt: skip
    config = tiny_config(
        student_dir, teacher_dir, prompts, tmp_path / "run",
        seed=seed,
        data={"heldout_size": 0},
        generate={"max_new_tokens": settings.max_new_tokens},
        score={"top_k": settings.top_k, "row_tokens": settings.row_tokens},
        filter={
            "drop_truncated": settings.drop_truncated, "low": settings.low, "high": settings.high,
            "tolerance": settings.tolerance, "min_nll": settings.min_nll,
        },
        train={
            "lr": settings.lr, "min_lr": settings.min_lr, "weight_decay": settings.weight_decay,
            "batch_size": settings.batch_size, "row_tokens": settings.row_tokens,
            "clip": settings.clip,
        },
        schedule={
            "epochs": epochs, "refresh": {"at_epochs": list(refresh_at)} if refresh_at else "never",
            "overlap": False,
        },
        eval={"source": "none"},
        checkpoint={"every_steps": None},
    )  # fmt: skip
    run = npd.run(config, view=SilentView())
    loop.generate = by_snapshots_of(run, loop.generate)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models
    )
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    samples, steps = loop.distill(student, teacher, tokenizer, texts, settings, mix=hash64)
    weights = {name: weight.detach() for name, weight in student.named_parameters()}
    return Both(samples, steps, weights, run)


def check_samples(both: Both) -> None:
    """Same prompts, same texts token for token, same scores, same verdicts."""
    rollouts = both.library_samples(read_rollouts, both.layout.rollouts(0))
    scored = both.library_samples(read_scored, both.layout.scored(0))
    assert [x.id for x in both.samples] == sorted(rollouts)
    for x in both.samples:
        theirs = rollouts[x.id]
        assert x.prompt == theirs.prompt_ids.tolist()
        assert x.response == theirs.response_ids.tolist(), f"sample {x.id}"
        assert x.logprobs == pytest.approx(theirs.logprobs.tolist(), abs=1e-4)
        assert (x.id in scored) == (x.verdict != "truncated")
    for sample_id, theirs in scored.items():
        x = both.samples[sample_id]
        assert x.nlls == pytest.approx([getattr(theirs, name) for name in NLLS], abs=1e-4)
        assert x.delta_ifd == pytest.approx(delta_ifd(theirs), abs=1e-4)
        assert x.topk_ids.tolist() == theirs.topk_ids.tolist()
    assert {x.id for x in both.samples if x.verdict == "kept"} == both.library_kept()


def weight_gaps(both: Both) -> torch.Tensor:
    """The absolute differences of all final weights, one vector."""
    theirs = load_file(both.layout.checkpoint(both.run.step) / "model.safetensors")
    assert theirs.keys() == both.weights.keys()
    return torch.cat([(theirs[n] - both.weights[n]).abs().flatten() for n in theirs])


def loss_gap(both: Both) -> float:
    """The largest difference of a step's loss."""
    theirs = [step["loss"] for step in both.run.data.steps]
    return max(abs(a - b) for a, (b, _) in zip(theirs, both.steps, strict=True))


def check_training(both: Both, start_dir: Path) -> None:
    """Same loss and drift at each step, same weights at the end."""
    assert loss_gap(both) < 1e-4
    drifts = [step["drift"] for step in both.run.data.steps]
    assert [drift for _, drift in both.steps] == pytest.approx(drifts, rel=1e-2, abs=1e-5)
    gaps = weight_gaps(both)
    assert (gaps > 1e-5).float().mean() < 1e-3
    assert gaps.max() < 2 * LR
    start = AutoModelForCausalLM.from_pretrained(start_dir, dtype=torch.float32).state_dict()
    moved = torch.cat([(w - start[name]).flatten() for name, w in both.weights.items()])
    assert moved.abs().max() > 1e-3
    assert gaps.norm() < 5e-3 * moved.norm()


def test_the_example_and_the_library_are_the_same_run(loop, models, tmp_path):
    loop.score = round_as_stored(loop.score)
    both = run_both(loop, models, tmp_path, **FILTER)
    check_samples(both)
    verdicts = {x.verdict for x in both.samples}
    assert verdicts == {"kept", "degenerate", "disconnect"}
    assert any(x.verdict == "kept" and not 0.01 <= x.delta_ifd <= 0.2 for x in both.samples)
    with Ledger.reader(both.layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1], "one refresh"
    check_training(both, models[0])


def test_as_it_stands_the_example_differs_by_how_scores_are_stored(loop, models, tmp_path):
    both = run_both(
        loop, models, tmp_path,
        epochs=2, refresh_at=(), max_new_tokens=150, row_tokens=256, drop_truncated=True,
    )  # fmt: skip
    check_samples(both)
    assert {"kept", "truncated"} <= {x.verdict for x in both.samples}
    assert loss_gap(both) < 1e-4
    assert weight_gaps(both).mean() < 1e-6


def test_the_verdict_is_the_librarys(loop):
    rng = np.random.default_rng(0)
    config = FilterConfig()
    for scale in (0.04, 0.2, 2.0):
        for nlls in rng.exponential(scale, (300, 4)).tolist():
            stats = SampleStats(
                0, 0, 0, 5, 5, FinishReason.STOP, 0.0, **dict(zip(NLLS, nlls, strict=True))
            )
            x = loop.Sample(0, 0, [1], nlls=tuple(nlls))
            verdict = DeltaIfd(config).judge([stats], [])[0]
            assert loop.judge(x, loop.Settings()) == (verdict.reason or "kept")
            assert x.delta_ifd == pytest.approx(delta_ifd(stats))


def test_packing_changes_no_number(loop, models):
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    row = [loop.Sample(i, 0, [5 + i, 6, 7][: i + 1], response=[8, 9, 3 + i]) for i in range(3)]
    with torch.no_grad():
        packed, own = loop.predict(model, [x.prompt for x in row], row)
        alone = torch.cat([loop.predict(model, [x.prompt], [x])[0] for x in row])
    torch.testing.assert_close(packed, alone)
    assert own.shape == (9, 1)
    assert loop.pack(row, 100) == [row[::-1]]
    assert [[x.id for x in r] for r in loop.pack(row, 10)] == [[2], [1, 0]]


def test_the_command_line_writes_a_model_with_the_default_precision(loop, models, tmp_path, capsys):
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 6), tmp_path / "out"
    student, teacher = map(str, models)
    paths = f"--student {student} --teacher {teacher} --prompts {prompts} --out {out}"
    settings = "--epochs 4 --reuse 2 --refresh_at [2] --max_new_tokens 8 --batch_size 4 --lr 1e-3"
    loop.main(f"{paths} {settings} --drop_truncated false".split())
    assert "kept" in capsys.readouterr().out
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (student, out)
    )
    assert any(not torch.equal(before[name].bfloat16().float(), after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 2


def test_the_example_is_short_and_needs_nothing_of_npd():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) < 250
    assert not [line for line in source.splitlines() if line.startswith(("import npd", "from npd"))]
