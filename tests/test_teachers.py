"""Several teachers: each prompt is scored, written and evaluated by the one that it names."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import npd
from npd.config import RunConfig, ScoreConfig
from npd.config.load import dump_config, load_config
from npd.control.preflight import prepare
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import ConfigError, DataError, ModelError, RunError
from npd.generate import TeachersGenerator
from npd.models.loading import load_model
from npd.observe.metrics import read_metrics
from npd.printing import config_lines, result_lines
from npd.score import build_scorer
from npd.score.in_process import load_prefill_model
from npd.score.teachers import Teachers
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts, read_scored, write_rollouts, write_scored
from npd.types import FinishReason, Rollout, SampleRequest
from npd.workers import Factory, GenerateTask
from teacher_fixtures import QuietView, name_teachers, teaching_settings
from tiny_model import make_tokenizer, save_model

VOCAB = 300
SCORE = ScoreConfig(top_k=6, row_tokens=64, head_chunk=5, dtype="float32")


@pytest.fixture(scope="module")
def code_dir(tmp_path_factory):
    """A second teacher, unlike the first one."""
    return save_model(tmp_path_factory.mktemp("code"), seed=7, layers=1)


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir, code_dir):
    """Makes configs over prompts that name `math` and `code` in turn, or `names`."""

    def build(name="run", *, names=("math", "code"), teachers=None, **sections):
        prompts = name_teachers(tmp_path / "prompts.jsonl", *names)
        found = {"math": tiny_teacher_dir, "code": code_dir} if teachers is None else teachers
        settings = teaching_settings(tiny_model_dir, found, prompts, tmp_path / name, **sections)
        return RunConfig.model_validate(settings)

    return build


@pytest.fixture(scope="module")
def models(tiny_teacher_dir, code_dir):
    return {
        name: load_model(path, packed=False)
        for name, path in {"math": tiny_teacher_dir, "code": code_dir}.items()
    }


def reference(model, context, response):
    """log p(y_t) by a plain forward of one sample."""
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64))[None]
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    return table[torch.arange(len(response)), response.astype(np.int64)].numpy()


def rollouts_of(*teachers, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, VOCAB, rng.integers(low, high)).astype(np.int32)

    return [
        Rollout(i, i, 0, ids(2, 12), ids(1, 4), ids(1, 20), None, FinishReason.STOP, i,
                teacher=teacher)
        for i, teacher in enumerate(teachers)
    ]  # fmt: skip


def scorer_by(teacher, student):
    scorer = build_scorer(
        SCORE,
        teacher=teacher,
        vocab_size=VOCAB,
        needs_ifd=True,
        needs_student_pass=True,
        support="topk",
        device="cpu",
        trust_remote_code=False,
        seed=0,
    )
    scorer.load_student(student, 0)
    return scorer


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


# Scores.


def test_scores_of_a_mixed_batch_are_each_teachers_own(tiny_model_dir, tiny_teacher_dir, code_dir):
    paths = {"math": tiny_teacher_dir, "code": code_dir, "other": "nowhere"}
    opened = []

    def load(name):
        opened.append(name)
        return load_prefill_model(SCORE, paths[name], VOCAB)

    rollouts = rollouts_of(*["math", "code", "code"] * 4)
    with closing(Teachers(load, lambda _: None)) as teachers:
        scorer = scorer_by(teachers, tiny_model_dir)
        mixed = scorer.score(rollouts)
        scorer.score(rollouts[:3])
        assert sorted(opened) == ["code", "math"], "at first use, once, and only those named"
        teachers.unload()
        scorer.score(rollouts[:1])
        assert opened[2:] == ["math"]
    assert [s.rollout for s in mixed] == rollouts
    for name in ("math", "code"):
        own = [s for s in mixed if s.rollout.teacher == name]
        alone = scorer_by(paths[name], tiny_model_dir).score([s.rollout for s in own])
        for a, b in zip(own, alone, strict=True):
            np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
            np.testing.assert_array_equal(a.topk_logprobs, b.topk_logprobs)
            np.testing.assert_array_equal(a.teacher_logprobs, b.teacher_logprobs)
            assert (a.nll_teacher, a.nll_teacher_alone) == (b.nll_teacher, b.nll_teacher_alone)
            assert a.nll_student == pytest.approx(b.nll_student, abs=1e-4)
    other = scorer_by(code_dir, tiny_model_dir).score(rollouts[:1])[0]
    assert abs(other.nll_teacher - mixed[0].nll_teacher) > 0.01, "the teachers differ"


class Closing:
    """What can be opened and closed; closing it may fail."""

    max_k = 64

    def __init__(self, fails):
        self.fails, self.is_closed = fails, False

    def close(self):
        self.is_closed = True
        if self.fails:
            raise RunError("it does not end")


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_every_teacher_is_closed_whatever_one_of_them_does(failing):
    made = {name: Closing(name == failing) for name in ("a", "b", "c")}
    teachers, writers = Teachers(made.get, made.get), TeachersGenerator(made.get)
    for opened, open_one in ((teachers, teachers.served), (writers, writers.open)):
        for name in made:
            open_one(name)
        with pytest.raises(RunError, match="does not end"):
            opened.close()
        assert all(item.is_closed for item in made.values())
        opened.close()


def test_shards_keep_the_name_and_are_as_ever_without(tmp_path, tiny_model_dir, tiny_teacher_dir):
    named, plain = rollouts_of("math", "default"), rollouts_of("default", "default")
    for rollouts, name in ((named, "named"), (plain, "plain")):
        scored = scorer_by(tiny_teacher_dir, tiny_model_dir).score(rollouts)
        write_rollouts(tmp_path / f"{name}.rollouts", rollouts)
        write_scored(tmp_path / f"{name}.scored", scored)
        assert [r.teacher for r in read_rollouts(tmp_path / f"{name}.rollouts")] == [
            r.teacher for r in rollouts
        ]
        assert [s.rollout.teacher for s in read_scored(tmp_path / f"{name}.scored")] == [
            r.teacher for r in rollouts
        ]
    for kind in ("rollouts", "scored"):
        assert b"teacher\0" in (tmp_path / f"named.{kind}").read_bytes()
    assert b"teacher\0" not in (tmp_path / "plain.rollouts").read_bytes()


# Whole runs.


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_every_sample_of_a_run_is_scored_by_its_own_teacher(make, models, kind):
    config = make(runtime={"kind": kind}, score={"workers": 2}, schedule={"overlap": False})
    view = QuietView()
    result = npd.run(config, view=view)
    layout, prompts = RunLayout(result.directory), prepare(config).prompts
    assert result.is_done
    seen = {"math": 0, "code": 0}
    shards = sorted(layout.scored(0).parent.glob("*.arrow"))
    for record in [item for path in shards for item in read_scored(path)]:
        rollout = record.rollout
        assert rollout.teacher == prompts[rollout.prompt_index].teacher
        expected = reference(models[rollout.teacher], rollout.prompt_ids, rollout.response_ids)
        np.testing.assert_allclose(record.teacher_logprobs, expected, atol=1e-4)
        seen[rollout.teacher] += 1
    assert min(seen.values()) >= 10
    mixed = [{r.teacher for r in read_rollouts(path)} for path in shards and layout.rollouts(0)
             .parent.glob("*.arrow")]  # fmt: skip
    assert {"math", "code"} in mixed, "a shard holds samples of both"
    with Ledger.reader(layout.ledger_db) as ledger:
        assert ledger.conservation().holds
    assert not [message for message in view.messages if "not loaded" in message]


def test_held_out_text_is_written_and_judged_by_each_prompts_own(make, models):
    config = make()
    chat = ChatTokenizer.load(config.student)
    result = npd.run(config, view=QuietView())
    layout = RunLayout(result.directory)
    heldout = {p.index: p for p in prepare(config).heldout}
    scored = read_scored(layout.heldout)
    assert {s.rollout.teacher for s in scored} == {"math", "code"}
    for record in scored:
        rollout = record.rollout
        prompt, model = heldout[rollout.prompt_index], models[rollout.teacher]
        assert rollout.teacher == prompt.teacher
        expected = reference(model, rollout.prompt_ids, rollout.response_ids)
        np.testing.assert_allclose(record.teacher_logprobs, expected, atol=1e-4)
        ids = torch.from_numpy(prompt.prompt_ids.astype(np.int64))[None]
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
            eos_token_id=sorted(chat.stop_ids), pad_token_id=chat.pad_id,
            suppress_tokens=list(range(chat.vocab_size, 304)),
        )  # fmt: skip
        assert written[0, ids.shape[1] :].tolist() == rollout.response_ids.tolist()


def test_the_divergence_from_each_teacher_is_told(make):
    config = make(observe={"report": True})
    result = npd.run(config, view=(view := QuietView()))
    layout = RunLayout(result.directory)
    for line in read_metrics(layout.metrics_jsonl, "eval"):
        assert min(line["kl/math"], line["kl/code"]) < line["kl"]
        assert max(line["kl/math"], line["kl/code"]) > line["kl"]
        assert "teacher_kls" not in line
    told = [m for m in view.messages if m.startswith("evaluated")]
    assert all("of code " in m and "of math " in m for m in told)
    shown = list(result_lines(result.data, layout))
    assert [line.split()[:2] for line in shown if line.startswith("  of")] == [
        ["of", "code"], ["of", "math"],
    ]  # fmt: skip
    page = result.report.read_text()
    assert "Held-out KL to the teacher code" in page
    assert "(math)" in page
    for line in read_metrics(layout.metrics_jsonl, "score"):
        own = [line[key] for key in ("kept_share/math", "kept_share/code") if key in line]
        assert own
        assert all(0.0 <= share <= 1.0 for share in own)


def test_the_mean_over_teachers_is_that_over_tokens(make):
    """The run's KL is that of all held-out tokens together, whoever wrote them."""
    from npd.evaluate import heldout_kl, kl_by_teacher

    result = npd.run(make(), view=QuietView())
    scored = read_scored(RunLayout(result.directory).heldout)
    model = load_model(result.student)
    whole = heldout_kl(model, scored, 256, 64)
    parts = kl_by_teacher(whole, scored)
    assert [name for name, _ in parts] == ["code", "math"]
    for name, kl in parts:
        own = [item for item in scored if item.rollout.teacher == name]
        assert kl == pytest.approx(heldout_kl(model, own, 256, 64).kl, rel=1e-4)
        assert kl_by_teacher(heldout_kl(model, own, 256, 64), own) == ()


def test_one_of_several_teachers_is_the_default(make, tiny_teacher_dir, code_dir):
    config = make(names=(None, "code"), teachers={"default": tiny_teacher_dir, "code": code_dir})
    result = npd.run(config, view=QuietView())
    (line, *_) = read_metrics(RunLayout(result.directory).metrics_jsonl, "eval")
    assert line["kl/default"] != line["kl/code"]


def test_each_teacher_writes_what_it_would_write_alone(make, tiny_teacher_dir, code_dir):
    sections = {
        "generate": {"source": "teacher"}, "schedule": {"refresh": "never"},
        "loss": {"kd_weight": 0.0}, "filter": {"name": "none"},
    }  # fmt: skip
    config = make(**sections)
    requests = tuple(
        SampleRequest(10 + i, 100 + i, p) for i, p in enumerate(prepare(config).prompts[:6])
    )
    found = {}
    for name, teacher in {"both": None, "math": tiny_teacher_dir, "code": code_dir}.items():
        teachers = None if teacher is None else {"math": teacher, "code": teacher}
        settings = make(name, teachers=teachers, **sections)
        (layout := RunLayout(settings.directory)).create()
        with closing(Factory("generator", settings, layout.root)()) as worker:
            worker.generate(GenerateTask(0, 0, requests))
        found[name] = [r.response_ids.tolist() for r in read_rollouts(layout.rollouts(0))]
    assert found["math"] != found["code"]
    for i, ask in enumerate(requests):
        assert found["both"][i] == found[ask.prompt.teacher][i]
    assert npd.run(make("whole", **sections), view=QuietView()).is_done


def test_a_teacher_that_nobody_names_is_told(make, tiny_teacher_dir):
    teachers = dict.fromkeys(("default", "math", "idle"), tiny_teacher_dir)
    view = QuietView()
    assert npd.run(make(names=("math",), teachers=teachers), view=view).is_done
    assert [message for message in view.messages if "no prompt names it" in message] == [
        f"{role}: no prompt names it, so it is not loaded: take it out of the config, or correct "
        "the data's `teacher`"
        for role in ("teacher", "teachers.idle")
    ]


class Interrupting(QuietView):
    """Sends the process a real SIGINT once a step was taken."""

    def __init__(self):
        super().__init__()
        self._sent = False

    def update(self, state):
        if state.step >= 4 and not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_resumes_to_the_same_weights(make, tmp_path):
    whole = npd.run(make("whole"), view=QuietView())
    cut = npd.run(make("cut"), view=Interrupting())
    assert not cut.is_done
    shards = RunLayout(cut.directory).scored(0).parent
    max(shards.glob("*.arrow")).unlink()
    resumed = npd.run(make("cut"), resume=True, view=QuietView())
    a, b = weights(whole.student), weights(resumed.student)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_refuses_other_teachers(make, tmp_path, tiny_teacher_dir, code_dir):
    own = save_model(tmp_path / "own", seed=7, layers=1)
    teachers = {"math": tiny_teacher_dir, "code": own}
    npd.run(make(teachers=teachers), view=Interrupting())
    for changed in (
        {"math": tiny_teacher_dir, "code": code_dir},
        {"math": tiny_teacher_dir, "code": own, "more": code_dir},
        {"code": own, "math": own},
    ):
        with pytest.raises(ConfigError, match=r"was started with teachers=.*--set teachers="):
            npd.run(make(teachers=changed), resume=True, view=QuietView())
    save_model(own, seed=8, layers=1)
    with pytest.raises(ModelError, match=r"the teachers\.code changed since"):
        npd.run(make(teachers=teachers), resume=True, view=QuietView())
    save_model(own, seed=7, layers=1)
    assert npd.run(make(teachers=teachers), resume=True, view=QuietView()).is_done


# What a config and its data must not say.


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("math", "cod"), r"prompts\.jsonl:2 \(and 11 more\) names the teacher 'cod' \(did you "
                          r"mean code\?\), and those of the run are math, code: correct"),
        (("math", None), r"prompts\.jsonl:2 \(and 11 more\) names no teacher, and the run has none "
                         r"for such prompts: set `teacher`, or name one of math, code"),
        ((*["math"] * 23, "physics"), r"prompts\.jsonl:24 names the teacher 'physics', and"),
    ],
)  # fmt: skip
def test_names_that_the_run_does_not_have(make, names, says):
    """The last one is held out."""
    with pytest.raises(DataError, match=says):
        prepare(make(names=names))


def test_a_name_with_one_teacher_only(make, tiny_teacher_dir):
    with pytest.raises(DataError, match=r"has none by name: set `teachers: \{math: DIR\}`"):
        prepare(make(names=("math",), teachers={"default": tiny_teacher_dir}))


def test_names_do_not_matter_where_nobody_asks_a_teacher(make):
    sections = {
        "generate": {"source": "dataset"}, "schedule": {"refresh": "never"},
        "loss": {"kd_weight": 0.0}, "filter": {"name": "none"}, "eval": {"source": "none"},
    }  # fmt: skip
    assert prepare(make(names=("who", None), teachers={}, **sections)).notes == ()


def test_every_teacher_must_share_the_vocabulary(make, tmp_path, tiny_teacher_dir):
    other = save_model(tmp_path / "other", seed=1)
    make_tokenizer(["quite other words make quite other merges"] * 20).save_pretrained(other)
    config = make(teachers={"math": tiny_teacher_dir, "code": other})
    with pytest.raises(ModelError, match=rf"teacher {other} and student .* vocabulary"):
        prepare(config)
    config = make(teachers={"math": tiny_teacher_dir, "code": Path("./no/such/place")})
    with pytest.raises(
        ModelError, match=r"no model directory at no/such/place.*correct `teachers\.code`"
    ):
        prepare(config)


def test_a_file_of_teachers_reads_as_it_prints(make, tmp_path):
    dumped = dump_config(make())
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(dumped | {"teachers": {"math": "a", "code": {"model": "b"}}}))
    settings = load_config(path, ["teachers.code=c", "teachers.more={model: d}"])
    teachers = settings.config.teachers
    assert {name: teacher.model for name, teacher in teachers.items()} == {
        "math": "a", "code": "c", "more": "d",
    }  # fmt: skip
    assert settings.origins["teachers.code.model"] == "--set"
    assert settings.origins["teachers.math.model"] == str(path)
    printed = tmp_path / "printed.yaml"
    printed.write_text("".join(f"{line}\n" for line in config_lines(settings)))
    assert load_config(printed).config == settings.config
    assert "teachers: {}" in "\n".join(config_lines(load_config("npd", ["student=a", "teacher=b"])))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{default: a}", "which is reserved for prompts without a teacher"),
        ("{'a b': a}", "'a b' is not a valid name: use letters, digits, _ and -"),
        ("{math: {modle: a}}", "teachers.math.modle"),
        ("{math: {urls: [http://a]}}", "teachers.math.model"),
        ("[a, b]", "teachers must be"),
    ],
)
def test_what_teachers_cannot_be(tmp_path, text, says):
    with pytest.raises(ConfigError) as caught:
        load_config("npd", ["student=a", "teacher=b", f"teachers={text}"])
    assert says in str(caught.value)


def test_a_run_without_any_teacher_is_told_what_to_set():
    with pytest.raises(ConfigError, match="set `teacher` or `teachers`"):
        load_config("npd", ["student=a"])
