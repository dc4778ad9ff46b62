"""`data.chat_template` and its switches: what is rendered, saved, compared and recorded."""

import json

import pytest
from transformers import AutoTokenizer

import npd
from npd import stages
from npd.control.preflight import Preflight, prepare
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.inputs import for_workers
from npd.data.vocabulary import compare_ends
from npd.errors import ConfigError, DataError
from npd.export import export_model
from npd.store.layout import RunLayout
from npd.types import Prompt
from teacher_fixtures import QuietView
from tiny_model import CHAT_TEMPLATE, make_model, make_tokenizer
from tiny_run import tiny_config, write_prompts

SWITCHED = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}",
)
OTHER = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save(path, template=CHAT_TEMPLATE, seed=0, **tokens):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    make_model(seed=seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make(tmp_path, tiny_teacher_dir):
    """The config of a tiny run with these settings of its data."""

    def build(template=CHAT_TEMPLATE, *, teacher=None, **data):
        student = save(tmp_path / "student", template)
        prompts = write_prompts(tmp_path / "prompts.jsonl")
        teacher = tiny_teacher_dir if teacher is None else teacher
        return tiny_config(student, teacher, prompts, tmp_path / "run", data=data)

    return build


def written(config, text="hi", **args):
    chat = ChatTokenizer.of_student(config)
    encoded = chat.encode(Prompt(0, text=text, template_args=args))
    return chat.tokenizer.decode(encoded.prompt_ids), chat.tokenizer.decode(encoded.header_ids)


def test_switches_are_on_in_every_rendering_and_a_record_s_own_go_first(make):
    config = make(SWITCHED, chat_template_kwargs={"enable_thinking": False})
    for text in written(config):
        assert text.endswith("assistant\n<think></think>")
    for text in written(config, enable_thinking=True):
        assert text.endswith("assistant\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"enable_thinkng": False}, "sets enable_thinkng, which the chat template of"),
        ({"add_generation_prompt": False}, "cannot set add_generation_prompt"),
        ({"tools": []}, "cannot set tools"),
    ],
)
def test_switches_without_effect_are_refused(make, args, says):
    with pytest.raises(ConfigError, match=says):
        prepare(make(SWITCHED, chat_template_kwargs=args))


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("own", [CHAT_TEMPLATE, None])
def test_a_template_of_one_s_own_is_a_file_or_its_text(make, tmp_path, own, is_text):
    (tmp_path / "own.jinja").write_text(OTHER)
    config = make(own, chat_template=OTHER if is_text else str(tmp_path / "own.jinja"))
    assert written(config) == ("[user] hi<|im_end|>[assistant] ", "[user] <|im_end|>[assistant] ")
    prepared = prepare(config)
    (tmp_path / "own.jinja").unlink()
    # Workers get the text, since their machine may lack the file.
    assert written(for_workers(config, prepared))[0] == "[user] hi<|im_end|>[assistant] "


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "own.jinja does not exist"),
        (b"no template", "is not a Jinja template"),
        (b'{"chat_template": "{{ x }}"}', "is not a Jinja template"),
        (b"\xff\xfe{{", "is not UTF-8 text"),
        (b"{% for m in messages %}{{ m.content }}", "cannot write a question: "),
        (b"{{ 'always the same' }}", "does not write what the user says"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(make, tmp_path, content, says):
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        prepare(make(chat_template=str(path)))
    assert "\n" not in str(caught.value)


def test_a_template_with_marks_that_are_no_tokens_is_told(make):
    foreign = OTHER.replace("<|im_end|>", "<|eot_id|>")
    (note,) = prepare(make(chat_template=foreign)).notes[1:]
    assert note.startswith("data.chat_template ends a turn with <|eot_id|>, which is no special")
    chat = ChatTokenizer.of_student(make(chat_template=foreign))
    encoded = chat.encode(Prompt(0, text="hi", completion="ho"))
    assert chat.tokenizer.decode(encoded.completion_ids) == "ho<|im_end|>"


def test_template_and_switches_are_in_the_fingerprint(make, tmp_path):
    path = tmp_path / "own.jinja"
    seen = set()
    for template in (SWITCHED, OTHER, SWITCHED + "{# the same text #}"):
        path.write_text(template)
        seen.add(prepare(make(chat_template=str(path))).data_fingerprint)
    path.write_text(SWITCHED)
    for args in ({"enable_thinking": False}, {"enable_thinking": True}):
        config = make(chat_template=str(path), chat_template_kwargs=args)
        seen.add(prepare(config).data_fingerprint)
    assert len(seen) == 4, "true is the template's default, and renders the same"


@pytest.mark.parametrize("is_lora", [False, True])
def test_a_run_saves_its_template_with_the_student_and_resumes_with_it_only(
    make, tmp_path, is_lora
):
    path = tmp_path / "own.jinja"
    path.write_text(OTHER)
    config = make(chat_template=str(path))
    train = config.train
    if is_lora:
        pytest.importorskip("peft")
        train = npd.RunConfig.model_validate(
            {**config.model_dump(mode="json"), "train": {"lora": {"rank": 2}}}
        ).train.model_copy(update={"row_tokens": 256, "batch_size": 6, "dtype": "float32"})
    config = config.model_copy(update={"train": train})
    npd.run(config, view=QuietView())
    layout = RunLayout(config.directory)
    exported = export_model(layout.snapshot(1), tmp_path / "exported")
    for folder in (layout.student, exported):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == OTHER
    path.write_text(OTHER.replace("[", "("))
    with pytest.raises(DataError, match="the prompts changed"):
        npd.run(config, resume=True, view=QuietView())
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"chat_template": None})}
    )
    with pytest.raises(ConfigError, match=r"was started with data\.chat_template="):
        npd.run(other, resume=True, view=QuietView())


def test_stages_alone_save_the_template_too(make, tmp_path):
    config = make(chat_template=OTHER)
    stages.generate(config, tmp_path / "rollouts.arrow")
    stages.score(config, tmp_path / "rollouts.arrow", tmp_path / "scored.arrow")
    list(stages.train(config, tmp_path / "scored.arrow", tmp_path / "trained"))
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").chat_template == OTHER


def test_teachers_with_another_template_or_end_are_shown_beside_the_student(make, tmp_path):
    teacher = save(tmp_path / "other", OTHER, seed=1)
    checks = list(Preflight(make(teacher=teacher)).checks())
    said = {check.what: check.says for check in checks if check.what.startswith("template: ")}
    assert said == {
        "template: student": (
            "a question is written as <|im_start|>user\\nWhat is 2 + 2?<|im_end|>\\n"
            "<|im_start|>assistant\\n"
        ),
        "template: teacher": (
            "a question is written as [user] What is 2 + 2?<|im_end|>[assistant] "
        ),
    }
    (warned,) = [check for check in checks if check.status == "warn"]
    assert "set data.chat_template to the teacher's" in warned.says
    alike = list(Preflight(make(teacher=teacher, chat_template=OTHER)).checks())
    assert not [check for check in alike if check.status == "warn"]
    assert [c.what for c in alike if c.what.startswith("template: ")] == ["template: student"]


def test_a_switch_of_both_templates_makes_no_difference_between_them(make, tmp_path):
    teacher = save(tmp_path / "other", SWITCHED, seed=1)
    config = make(SWITCHED, teacher=teacher, chat_template_kwargs={"enable_thinking": False})
    ends = compare_ends(config, ChatTokenizer.of_student(config))
    assert (ends.notes, list(ends.samples)) == ((), ["student"])


def test_a_turn_closed_by_another_of_the_same_end_tokens_is_told(make, tmp_path):
    """Both models stop at both tokens, and each closes its turns with another."""
    teacher = save(tmp_path / "other", CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"), seed=1)
    config = make(teacher=teacher)
    for folder in (config.student, config.teacher):
        path = f"{folder}/generation_config.json"
        with open(path) as file:
            settings = json.load(file)
        with open(path, "w") as file:
            json.dump({**settings, "eos_token_id": [0, 2]}, file)
    ends = compare_ends(config, ChatTokenizer.of_student(config))
    assert ends.stop_ids == {0, 2}
    assert ends.notes[0].startswith(
        "the teacher closes a turn with <|endoftext|>, the student with <|im_end|>"
    )
