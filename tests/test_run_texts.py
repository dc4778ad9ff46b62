"""A run and its text: end tokens of both models, whole completions, the clock, prose answers."""

import json
from pathlib import Path

import pytest

import npd
from npd.control.preflight import Preflight, prepare
from npd.control.run_directory import open_directory
from npd.control.run_record import clock_of
from npd.data.inputs import for_workers
from npd.errors import ConfigError, DataError, ModelError
from npd.export import export_model
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts
from teacher_fixtures import QuietView
from tiny_model import CHAT_TEMPLATE, make_model, make_tokenizer
from tiny_run import tiny_config, write_prompts

END_OF_TEXT, IM_END = 0, 2
SFT = {
    "generate": {"source": "dataset", "max_new_tokens": 4},
    "schedule": {"refresh": "never", "epochs": 2},
    "loss": {"kd_weight": 0.0},
    "filter": {"name": "none"},
    "eval": {"source": "none"},
}


def save(path: Path, template=CHAT_TEMPLATE, seed=0, **tokens) -> Path:
    """A tiny model whose tokenizer has this template and these special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    model = make_model(seed=seed)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make(tmp_path, tiny_teacher_dir):
    """Makes the config of a tiny run of a student with a given template."""

    def build(template=CHAT_TEMPLATE, *, teacher=None, tokens=None, rows=None, **sections):
        student = save(tmp_path / "student", template, **(tokens or {}))
        prompts = write_prompts(tmp_path / "prompts.jsonl")
        if rows is not None:
            prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        teacher = tiny_teacher_dir if teacher is None else teacher
        return tiny_config(student, teacher, prompts, tmp_path / "run", **sections)

    return build


def test_end_tokens_of_student_and_teacher_both_end_and_are_saved(make):
    config = make(None, tokens={"eos_token": "<|endoftext|>"})
    prepared = prepare(config)
    assert prepared.stop_ids == {END_OF_TEXT, IM_END}
    ends, template = prepared.notes
    assert "the teacher ends a response with <|im_end|>, the student with <|endoftext|>" in ends
    assert "the teacher has a chat template and the student has none" in template
    assert for_workers(config, prepared).generate.stop_ids == (END_OF_TEXT, IM_END)
    warned = [check.says for check in Preflight(config).checks() if check.status == "warn"]
    assert set(prepared.notes) <= set(warned)

    view = QuietView()
    result = npd.run(config, view=view)
    assert set(prepared.notes) <= set(view.messages)
    for saved in (Path(result.student), RunLayout(result.directory).snapshot(1)):
        settings = json.loads((saved / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [END_OF_TEXT, IM_END]


def test_adapters_take_the_end_tokens_along(make, tmp_path):
    pytest.importorskip("peft")
    lora = {"lora": {"rank": 2}, "lr": 1e-3}
    config = make(None, tokens={"eos_token": "<|endoftext|>"}, train=lora)
    result = npd.run(config, view=QuietView())
    merged = export_model(RunLayout(result.directory).snapshot(1), tmp_path / "merged")
    for saved in (Path(result.student), merged):
        settings = json.loads((saved / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [END_OF_TEXT, IM_END]


def test_models_of_one_kind_give_no_warning(make):
    prepared = prepare(make())
    assert (prepared.notes, prepared.stop_ids) == ((), {IM_END})
    assert prepared.remarks == ("data: read as prompts",)


def test_ids_that_the_config_adds_must_exist(make):
    assert prepare(make(generate={"stop_ids": [5]})).stop_ids == {IM_END, 5}
    with pytest.raises(ConfigError, match=r"generate\.stop_ids has 9999"):
        prepare(make(generate={"stop_ids": [9999]}))


LONG = [{"prompt": f"what is {i}?", "completion": "so " * (4 + i)} for i in range(12)]


def test_completions_are_trained_on_whole_and_the_longer_ones_are_told(make):
    config = make(rows=LONG, **SFT)
    told = [remark for remark in prepare(config).remarks if "generate.max_new_tokens" in remark]
    assert len(told) == 1
    assert "12 of 12 completions have more than generate.max_new_tokens (4)" in told[0]
    result = npd.run(config, view=QuietView())
    shards = sorted(RunLayout(result.directory).rollouts(0).parent.glob("*.arrow"))
    rollouts = [rollout for shard in shards for rollout in read_rollouts(shard)]
    assert {rollout.response_ids[-1] for rollout in rollouts} == {IM_END}
    assert {rollout.finish.value for rollout in rollouts} == {"stop"}
    assert max(len(rollout.response_ids) for rollout in rollouts) > 15


def test_messages_beside_a_prompt_are_named_where_completions_are_missing(make):
    turns = [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "4!"}]
    rows = [{"prompt": f"{i}?", "messages": turns} for i in range(12)]
    with pytest.raises(DataError, match=r"--set data\.format=messages$"):
        prepare(make(rows=rows, data={"format": "prompt"}, **SFT))
    prepared = prepare(make(rows=rows, data={"format": "messages"}, **SFT))
    assert all(prompt.completion_ids is not None for prompt in prepared.prompts)


def test_longer_completions_than_allowed_stop_or_are_dropped(make):
    config = make(rows=LONG, **SFT)
    longest = max(len(p.completion_ids) for p in prepare(config).prompts)
    limited = make(rows=LONG, data={"max_completion_tokens": longest - 1}, **SFT)
    with pytest.raises(DataError, match=rf"1 of 12 .*set data\.max_completion_tokens={longest}"):
        prepare(limited)
    dropping = make(
        rows=LONG,
        data={"max_completion_tokens": longest - 1, "on_long_completion": "drop"},
        **SFT,
    )
    prepared = prepare(dropping)
    assert (len(prepared.prompts), prepared.dropped) == (11, {"long_completion": 1})


def test_completions_that_no_row_or_model_holds_name_what_makes_room(make):
    rows = [{"prompt": "what?", "completion": "so " * 200}, *LONG]
    with pytest.raises(DataError, match=r"less data\.max_prompt_tokens.*train\.row_tokens=(\d+)"):
        prepare(make(rows=rows, **SFT))
    wide = {"train": {"row_tokens": 4096, "batch_size": 2}}
    rows[0]["completion"] = "so " * 600
    with pytest.raises(ModelError, match=r"data\.max_completion_tokens bounds.*context is 512"):
        prepare(make(rows=rows, **SFT | wide))


CLOCK = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHAT_TEMPLATE


class Stopping(QuietView):
    """Interrupts the run as soon as it has trained a segment."""

    def update(self, state):
        if state.step and not self.stopped:
            import signal

            self.stopped = True
            signal.raise_signal(signal.SIGINT)

    stopped = False


def test_a_template_with_a_clock_resumes_at_the_time_of_the_start(make):
    config, view = make(CLOCK), Stopping()
    assert not npd.run(config, view=view).is_done
    assert any("the chat template writes the date" in message for message in view.messages)
    # Rendered anew, no prompt would be the same: the template writes microseconds.
    assert npd.run(config, resume=True, view=QuietView()).is_done


def test_other_data_is_noticed_though_the_clock_stands_still(make, tmp_path):
    config = make(CLOCK)
    prepared = prepare(config)
    open_directory(config, prepared, resume=False, origins={})
    assert clock_of(config) == prepared.clock
    open_directory(config, prepare(config, clock=clock_of(config)), resume=True, origins={})
    with pytest.raises(DataError, match="the prompts changed"):
        open_directory(config, prepare(config), resume=True, origins={})
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows[3]["completion"] = "something else, which nobody trains on here"
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the prompts changed"):
        open_directory(config, prepare(config, clock=clock_of(config)), resume=True, origins={})


def test_the_record_says_what_was_held_out_and_what_ends_a_response(make):
    config = make(data={"heldout_size": None})
    layout = open_directory(config, prepare(config), resume=False, origins={})
    record = json.loads(layout.config_json.read_text())
    assert (record["num_prompts"], record["num_heldout"]) == (22, 2)
    assert (record["stop_ids"], record["clock"]) == ([IM_END], None)


REFUSING = CHAT_TEMPLATE.replace(
    "<|im_start|>{{ m",
    "{% if not m['content'] %}{{ raise_exception('empty message') }}{% endif %}<|im_start|>{{ m",
    1,
)


def test_answer_alone_context_is_asked_for_where_a_filter_needs_it(make):
    with pytest.raises(ModelError, match=r"answer-alone context.*empty message.*filter\.name"):
        prepare(make(REFUSING, filter={"name": "delta_ifd"}))
    assert prepare(make(REFUSING, filter={"name": "none"})).prompts


def test_prose_answers_are_left_out_of_exact_match_and_told(make):
    prose = "It is the moon because nothing else up there at night is as large and bright."
    answers = [prose, f"{prose} #### moon", "moon", 4.0, float("nan")] * 4
    rows = [{"prompt": f"what is {i}?", "answer": answer} for i, answer in enumerate(answers)]
    prepared = prepare(make(rows=rows, data={"heldout_size": 15}))
    kept = [prompt.answer for prompt in prepared.heldout]
    assert prose not in kept
    assert {"moon", "4.0", None} <= set(kept)
    num_prose = sum(answer == prose for answer in _answers_held_out(make, rows))
    assert any(note.startswith(f"{num_prose} of 15 held-out prompts") for note in prepared.notes)


def _answers_held_out(make, rows):
    from npd.data.prompts import load_prompts

    config = make(rows=rows, data={"heldout_size": 15})
    return [prompt.answer for prompt in load_prompts(config.data, config.seed).heldout]


def test_templates_that_refuse_a_record_stop_or_drop_it(make):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            **({"tools": [{"a": 1}]} if i == 5 else {}),
        }
        for i in range(12)
    ]
    with pytest.raises(DataError, match=r"prompts\.jsonl:6.*on_bad_record: drop"):
        prepare(make(rows=rows, data={"heldout_size": 0}, eval={"source": "none"}))
    dropping = {"heldout_size": 0, "on_bad_record": "drop"}
    prepared = prepare(make(rows=rows, data=dropping, eval={"source": "none"}))
    assert (len(prepared.prompts), prepared.dropped) == (11, {"bad_template": 1})


def test_columns_not_used_are_told(make):
    rows = [{"prompt": f"{i}?", "context": "read this"} for i in range(12)]
    assert prepare(make(rows=rows)).remarks == (
        "data: read as prompts",
        "columns not used: context (data.columns maps names)",
    )
