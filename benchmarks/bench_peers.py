"""TRL's `DistillationTrainer` against npd's trainer, and where the factor comes from.

Both train a random Llama of `--shape` (SmolLM2-135M's) with `--layers` layers towards one of
`--teacher-shape` with `--teacher-layers`, on the same prompts and the same response lengths:
log-normal, `--response` at most. What is counted is real tokens, prompt and response, a second of
the training process's own CPU time, one thread (with `--device cuda`, of wall time to the device's
end). TRL runs as its users meet it: `trainer.train()`, text prompts, transformers' `generate`,
teacher in the step, timed by a callback from the begin of a step to its end. Random weights never
end a text, so the student's `generate` forces the end token at each row's length. npd's trainer
reads the same samples, written and scored by other workers, from Arrow shards. That is the paper's
quantity (trainer throughput); it is not the speed of a run, whose other workers cost time as well.
The rows between the two take one thing out at a time:

    trl            generation, teacher, padded student
    trl, no text   the same trainer handed ready responses instead of generating
    padded+teacher npd's loss on the same padded batches, the teacher's top-10 found in the step
    padded         the same, the teacher's top-10 read
    small rows     packed, a row as large as one batch of samples
    npd            npd's Trainer, packed, large rows

TRL is given what favours it: bfloat16 weights for the student too (its updates round away, but
float32 ones are cast anew for every token that its `generate` writes), no recomputed activations,
forward KL, fused AdamW, `generate` without cuDNN's attention (slow where lengths grow),
`--accumulate` micro-batches of `--batch` written together. Its steps follow each other, after a
short one to warm up; npd's own loops take turns after them (on a GPU each by itself, for its
memory). TRL can also generate with vLLM, which is not measured: `trl, no text` is what would be
left if that took no time at all.

    OMP_NUM_THREADS=1 python benchmarks/bench_peers.py
    python benchmarks/bench_peers.py --device cuda --shape qwen2.5-1.5b --layers 28 \
        --teacher-shape qwen2.5-7b --teacher-layers 28 --samples 128 --batch 16 --accumulate 8 \
        --row-tokens 8192
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import (
    SHAPES,
    SMALL,
    VOCAB,
    Bar,
    Figure,
    Spread,
    clock_of,
    free,
    make_parser,
    parse,
    publish,
    random_model,
    seconds,
    speeds,
    take_turns,
)
from npd.config import LossConfig, TrainConfig
from npd.generate.decoding import without_cudnn_attention
from npd.models.loading import load_model
from npd.train.trainer import Trainer
from npd.types import Scored
from training import (
    Shards,
    make_segment,
    padded,
    padded_fill,
    padded_loop,
    random_samples,
)

END, PAD = 1, 2
MISSING = "bench_peers needs TRL: pip install 'trl>=1.16' (make install does)"


def words() -> Any:
    """A tokenizer whose words are the ids themselves, so that text becomes any tokens asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"unk_token": "0", "eos_token": str(END), "pad_token": str(PAD), "padding_side": "left"},
    )


def ending_model(base: Any, lengths: Sequence[int]) -> Any:
    """`base`, whose `generate` ends row i of its n-th batch after as many tokens as it is told."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Ending(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, start: int, rows: Sequence[int], device: torch.device) -> None:
            self._last = torch.tensor(rows, device=device) + start - 1

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            is_last = input_ids.shape[1] >= self._last
            scores[:, END] = torch.where(is_last, 1e4, -torch.inf)
            return scores

    class Student(type(base)):  # type: ignore[misc]
        calls = 0

        def generate(self, input_ids: torch.Tensor, **options: Any) -> Any:
            start = self.calls * len(input_ids)
            type(self).calls += 1
            rows = lengths[start : start + len(input_ids)]
            ending = Ending(input_ids.shape[1], rows, input_ids.device)
            processors = LogitsProcessorList([ending])
            with without_cudnn_attention():
                return super().generate(input_ids, logits_processor=processors, **options)

    base.__class__ = Student
    return base


def make_clock(clock: str) -> Any:
    """A callback that keeps the time of each step, by `clock`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._started = seconds(clock)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(seconds(clock) - self._started)

    return Clock()


def trl_steps(
    args: Any, samples: Sequence[Scored], directory: Path, *, generates: bool
) -> tuple[list[float], float]:
    """Seconds of TRL's steps on all samples, each round; its mean response as a check."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    at_once = args.batch * args.accumulate
    # A short step first, which is thrown away: it makes the optimiser's moments and fills caches.
    rollouts = [sample.rollout for sample in samples]
    short = [replace(r, response_ids=r.response_ids[:4]) for r in rollouts[:at_once]]
    fed = short + rollouts * args.rounds
    responses = [rollout.response_ids.tolist() for rollout in fed]

    class Handed(DistillationTrainer):  # type: ignore[misc]
        """TRL's trainer with its generation replaced by responses that exist already."""

        calls = 0

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            start = self.calls * len(prompt_ids)
            self.calls += 1
            return [[*ids[:-1], END] for ids in responses[start : start + len(prompt_ids)]]

    prompts = [" ".join(map(str, rollout.prompt_ids)) for rollout in fed]
    clock = make_clock(clock_of(args.device))
    student = load_plain(directory / "student", args.student_dtype, args.device).train()
    trainer = (DistillationTrainer if generates else Handed)(
        model=ending_model(student, list(map(len, responses))),
        teacher_model=make_teacher(args),
        args=DistillationConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            max_steps=len(fed) // at_once,
            max_completion_length=args.response,
            beta=0.0,
            bf16=args.student_dtype == "float32",
            use_cpu=args.device == "cpu",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=words(),
        callbacks=[clock],
    )
    trainer.train()
    key = "completions/mean_length"
    lengths = [log[key] for log in trainer.state.log_history if key in log][1:]
    each, steps = len(samples) // at_once, clock.seconds[1:]
    rounds = [sum(steps[i : i + each]) for i in range(0, len(steps), each)]
    return rounds, sum(lengths[:each]) / each


def load_plain(path: Path, dtype: str, device: str) -> Any:
    """A model as transformers gives it, with SDPA."""
    return load_model(path, dtype=dtype, device=device, packed=False)


def make_teacher(args: Any) -> Any:
    """The same each time, without a way over the disk: it may be large."""
    return random_model(
        args.teacher_layers, "bfloat16", shape=args.teacher_shape, device=args.device
    )


def own_steps(args: Any, samples: Sequence[Scored], directory: Path) -> dict[str, list[float]]:
    """Seconds of our own steps, in turn; on a GPU one after another, each alone there."""
    shards, loss = Shards(directory, samples), LossConfig()
    batches = padded(samples, args.batch, args.device)
    config = TrainConfig(row_tokens=args.row_tokens)

    def padded_step(teacher: Any) -> Callable[[], None]:
        model = load_plain(directory / "student", "float32", args.device).train()
        return padded_loop(model, batches, config, loss, teacher)

    def packed_step(row_tokens: int) -> Callable[[], None]:
        config = TrainConfig(row_tokens=row_tokens)
        trainer = Trainer(
            config, loss, student=directory / "student", read=shards.read, device=args.device
        )
        segment = make_segment(samples, row_tokens)

        def step() -> None:
            shards.open_anew()
            trainer.train(segment)

        return step

    batch_tokens = sum(s.rollout.num_tokens for s in samples) * args.batch // len(samples)
    longest = max(s.rollout.num_tokens for s in samples)
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "padded+teacher": lambda: padded_step(make_teacher(args)),
        "padded": lambda: padded_step(None),
        "small rows": lambda: packed_step(max(longest, batch_tokens)),
        "npd": lambda: packed_step(args.row_tokens),
    }
    if args.device == "cpu":
        return take_turns({name: make() for name, make in makers.items()}, args.rounds, "cpu")
    found: dict[str, list[float]] = {}
    for name, make in makers.items():
        found |= take_turns({name: make()}, args.rounds, "wall")
        free()
    return found


def figures_of(taken: dict[str, list[float]], tokens: int) -> list[Figure]:
    """The whole factor, and each of its parts."""

    def figure(what: str, ours: str, theirs: str, against: str, bar: Bar | None = None) -> Figure:
        # Steps of the two were not in turn, so the ratio's spread is that of all pairs.
        pairs = [b / a for a in taken[ours] for b in taken[theirs]]
        speed, other = speeds(tokens, taken[ours]), speeds(tokens, taken[theirs])
        return Figure(what, "tokens/s", speed, against, other, Spread.of(pairs), bar)

    trl = "TRL DistillationTrainer, whole step"
    return [
        figure("trainer throughput", "npd", "trl", trl, Bar("ratio", ">=", 8.1)),
        figure("· of it: generation out of the step", "trl, no text", "trl", trl),
        figure("· TRL's dense loss, bfloat16 weights and trainer", "padded+teacher", "trl, no text",
               "TRL, responses handed to it"),
        figure("· teacher out of the step", "padded", "padded+teacher", "padded, teacher in it"),
        figure("· padding out", "small rows", "padded", "padded, teacher out"),
        figure("· larger rows", "npd", "small rows", "packed, a row per batch"),
    ]  # fmt: skip


def parse_args() -> Any:
    """The command line."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 13), ("teacher-layers", 30), ("samples", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompt", 64), ("response", 512), ("batch", 8), ("accumulate", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("row-tokens", 4096), ("rounds", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=list(SHAPES), default=SMALL)
    parser.add_argument("--teacher-shape", choices=list(SHAPES), default=SMALL)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--student-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    small = {"layers": 2, "teacher_layers": 2, "samples": 4, "response": 32, "batch": 4}
    return parse(parser, {**small, "accumulate": 1, "rounds": 1})


def main() -> None:
    """TRL's steps, then ours."""
    args = parse_args()
    try:
        import trl
    except ImportError:
        raise SystemExit(MISSING) from None
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    samples = random_samples(args.samples, args.prompt, args.response)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        dtype = "float32" if args.device == "cpu" else "bfloat16"  # half as much to read
        model = random_model(args.layers, dtype, shape=args.shape, device=args.device)
        model.save_pretrained(directory / "student")
        del model
        found: dict[str, list[float]] = {}
        found["trl"], mean_length = trl_steps(args, samples, directory, generates=True)
        free()
        found["trl, no text"], _ = trl_steps(args, samples, directory, generates=False)
        free()
        found |= own_steps(args, samples, directory)
    tokens = sum(sample.rollout.num_tokens for sample in samples)
    details = {
        "trl": trl.__version__,
        "seconds": found,
        "tokens": tokens,
        "mean_response": sum(len(s.rollout.response_ids) for s in samples) / len(samples),
        "mean_response_trl_says": mean_length,
        "padded_fill": padded_fill(samples, args.batch),
        "padded_fill_of_1000_shuffles": padded_fill(samples, args.batch, 1000),
    }
    publish(args, figures_of(found, tokens), details)


if __name__ == "__main__":
    main()
