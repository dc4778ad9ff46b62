"""Chat: templates, headers, end tokens, and the comparison of vocabularies."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.vocabulary import check_same_vocabulary
from npd.errors import DataError, ModelError
from npd.types import Message, Prompt
from tiny_model import CHAT_TEMPLATE, make_tokenizer

END_OF_TEXT, IM_START, IM_END = 0, 1, 2


def conversation(*turns, index=0, **kwargs):
    return Prompt(index, messages=tuple(Message(*turn) for turn in turns), **kwargs)


def read(chat, ids):
    """Text of ids with their special tokens."""
    return chat.tokenizer.decode([int(i) for i in ids])


def plain_chat(**tokens):
    """A chat without a template; `tokens` replace the tokenizer's special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return ChatTokenizer(tokenizer)


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(make_tokenizer())


@pytest.fixture
def saved(tmp_path):
    """Save a tokenizer under a name; returns a function that gives the directory."""

    def save(tokenizer, name="model"):
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_conversation_ends_in_the_assistant_header(chat):
    encoded = chat.encode(conversation(("system", "be brief"), ("user", "2+2?"), index=7))
    expected = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert read(chat, encoded.prompt_ids) == expected
    assert encoded.prompt_ids.dtype == np.int32
    assert encoded.index == 7


def test_header_empties_the_user_and_keeps_roles_system_and_assistant(chat):
    encoded = chat.encode(
        conversation(("system", "S"), ("user", "secret"), ("assistant", "A"), ("user", "more"))
    )
    expected = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert read(chat, encoded.header_ids) == expected


def test_plain_text_is_one_user_message_where_there_is_a_template(chat):
    plain = chat.encode(Prompt(0, text="what is two?"))
    as_message = chat.encode(conversation(("user", "what is two?")))
    assert plain.prompt_ids.tolist() == as_message.prompt_ids.tolist()
    assert plain.header_ids.tolist() == as_message.header_ids.tolist()


def test_system_goes_before_conversations_that_have_none():
    chat = ChatTokenizer(make_tokenizer(), system="be kind")
    led = chat.encode(conversation(("user", "hi")))
    own = chat.encode(conversation(("system", "be rude"), ("user", "hi")))
    text = chat.encode(Prompt(0, text="hi"))
    assert read(chat, led.prompt_ids).startswith("<|im_start|>system\nbe kind<|im_end|>")
    assert "be kind" in read(chat, led.header_ids)
    assert "kind" not in read(chat, own.prompt_ids)
    assert text.prompt_ids.tolist() == led.prompt_ids.tolist()


def test_completion_is_closed_by_one_end_token(chat):
    encoded = chat.encode(Prompt(0, text="hi", completion="it is four."))
    assert encoded.completion_ids.tolist()[-1] == IM_END
    assert encoded.completion_ids.tolist().count(IM_END) == 1
    assert chat.decode(encoded.completion_ids) == "it is four."
    assert chat.encode(Prompt(0, text="hi")).completion_ids is None


def test_prompt_and_completion_tokenise_as_the_whole_text_does(chat):
    prompt = Prompt(0, text="what is two plus two?", completion="it is four. user")
    encoded = chat.encode(prompt)
    whole = (
        "<|im_start|>user\nwhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"
        "it is four. user<|im_end|>"
    )
    expected = chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*encoded.prompt_ids.tolist(), *encoded.completion_ids.tolist()] == expected


def test_completion_gets_no_space_from_the_tokenizer():
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    encoded = ChatTokenizer(tokenizer).encode(Prompt(0, text="a?", completion="b"))
    assert tokenizer.decode(encoded.completion_ids.tolist()[:-1]) == "b"


def test_completion_that_would_merge_with_the_prompt_is_tokenised_alone():
    chat = plain_chat()
    joined = chat.tokenizer("it", add_special_tokens=False)["input_ids"]
    assert len(joined) == 1, "the tokenizer should know `it` for this test to mean anything"
    encoded = chat.encode(Prompt(0, text="i", completion="t"))
    assert read(chat, encoded.prompt_ids) == "i"
    assert read(chat, encoded.completion_ids[:-1]) == "t"


def test_answer_and_teacher_travel_along(chat):
    encoded = chat.encode(Prompt(3, text="hi", answer="4", teacher="big"))
    assert (encoded.answer, encoded.teacher) == ("4", "big")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_without_a_template(adds_bos):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[("<|im_start|>", IM_START), ("<|im_end|>", IM_END)],
        )
    encoded = ChatTokenizer(tokenizer).encode(Prompt(0, text="two", completion="it"))
    text = tokenizer("two", add_special_tokens=False)["input_ids"]
    assert encoded.prompt_ids.tolist() == ([IM_START] if adds_bos else []) + text
    assert encoded.header_ids.tolist() == [IM_START]
    assert encoded.completion_ids.tolist().count(IM_START) == 0


def test_header_of_plain_text_without_bos_is_the_end_token():
    chat = plain_chat(bos_token=None)
    assert chat.encode(Prompt(0, text="two")).header_ids.tolist() == [IM_END]


def test_template_that_renders_nothing_still_gives_a_header():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoded = ChatTokenizer(tokenizer).encode(conversation(("user", "two")))
    assert encoded.header_ids.tolist() == [IM_START]


def test_conversation_without_a_template_is_refused():
    with pytest.raises(ModelError, match="no chat template, but prompt 4"):
        plain_chat().encode(conversation(("user", "hi"), index=4))


def test_system_without_a_template_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"data\.system"):
        ChatTokenizer(tokenizer, system="be kind")


def test_refusal_of_the_template_names_the_prompt():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    chat = ChatTokenizer(tokenizer)
    chat.encode(conversation(("user", "fine")))
    with pytest.raises(DataError, match=r"prompt 9 \(roles system, user\): no system role"):
        chat.encode(conversation(("system", "s"), ("user", "u"), index=9))


def test_end_token_is_what_the_template_closes_a_turn_with():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    chat = ChatTokenizer(tokenizer)
    assert chat.end_id == IM_END
    assert chat.stop_ids == {END_OF_TEXT, IM_END}
    assert chat.encode(Prompt(0, text="a", completion="b")).completion_ids[-1] == IM_END


def test_template_without_an_end_of_turn_falls_back_on_eos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert ChatTokenizer(tokenizer).end_id == IM_END


def test_stop_ids_include_the_generation_config(saved):
    path = saved(make_tokenizer())
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 99_999]}))
    assert ChatTokenizer.load(path).stop_ids == {2, 5}, (
        "an id outside the vocabulary can never be sampled"
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert ChatTokenizer.load(path).stop_ids == {0, 2}
    (path / "generation_config.json").unlink()
    assert ChatTokenizer.load(path).stop_ids == {2}


def test_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ModelError, match="no end token"):
        plain_chat(eos_token=None)


def test_pad_falls_back_on_the_end_token():
    assert ChatTokenizer(make_tokenizer()).pad_id == END_OF_TEXT
    assert plain_chat(pad_token=None).pad_id == IM_END


def test_every_id_is_below_the_vocabulary_size(chat):
    assert chat.vocab_size == len(chat.tokenizer)
    assert max(chat.tokenizer.get_vocab().values()) == chat.vocab_size - 1


def test_decode_leaves_special_tokens_out_and_takes_arrays(chat):
    ids = np.asarray([IM_START, *chat.tokenizer("it is four. ")["input_ids"], IM_END], np.int32)
    assert chat.decode(ids) == "it is four. "
    assert chat.decode([]) == ""


turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=12)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(st.one_of(turns, st.text(max_size=20)), max_size=4),
    completion=st.text(max_size=8),
)
def test_encoding_together_equals_encoding_alone(chat, sources, completion):
    prompts = [
        Prompt(i, text=s, completion=completion)
        if isinstance(s, str)
        else conversation(*s, index=i, completion=completion)
        for i, s in enumerate(sources)
    ]
    for prompt, one in zip(prompts, chat.encode_all(prompts), strict=True):
        alone = chat.encode(prompt)
        assert one.index == prompt.index
        assert one.prompt_ids.tolist() == alone.prompt_ids.tolist()
        assert one.header_ids.tolist() == alone.header_ids.tolist()
        assert one.completion_ids.tolist() == alone.completion_ids.tolist()
        assert len(one.header_ids) >= 1


def test_load_from_a_model_directory(tiny_model_dir):
    chat = ChatTokenizer.load(tiny_model_dir, system="s")
    assert chat.system == "s"
    assert chat.stop_ids == {IM_END}


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_load_from_a_missing_directory(path):
    with pytest.raises(ModelError, match="no model directory at"):
        ChatTokenizer.load(path)


def test_load_from_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*; give"):
        ChatTokenizer.load(tmp_path)


def test_load_from_an_unreachable_name_is_one_line():
    with pytest.raises(ModelError, match="nobody/nothing") as caught:
        ChatTokenizer.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_same_vocabulary_whatever_the_model_pads(tiny_model_dir, tiny_teacher_dir, tmp_path):
    padded = shutil.copytree(tiny_teacher_dir, tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    check_same_vocabulary(padded, tiny_model_dir)


def edit_tokenizer(path, change):
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def test_swapped_tokens_are_named(saved):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    a = make_tokenizer().get_vocab()["a"]
    student = saved(make_tokenizer(), "student")
    teacher = edit_tokenizer(saved(make_tokenizer(), "teacher"), swap)
    with pytest.raises(ModelError) as caught:
        check_same_vocabulary(teacher, student)
    assert f"id {a}: teacher 'b', student 'a'" in str(caught.value)
    assert str(teacher) in str(caught.value)


def test_tokens_only_one_side_has_are_named(saved):
    more = make_tokenizer()
    size = len(more)
    more.add_tokens(["<think>", "<w>", "<x>", "<y>"])
    teacher, student = saved(more, "teacher"), saved(make_tokenizer(), "student")
    with pytest.raises(ModelError, match=rf"id {size}: teacher '<think>', student None.*1 more"):
        check_same_vocabulary(teacher, student)


def test_different_merges_of_one_vocabulary_are_noticed(saved):
    def swap(content):
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    teacher = edit_tokenizer(saved(make_tokenizer(), "teacher"), swap)
    with pytest.raises(ModelError, match="merge 0: teacher"):
        check_same_vocabulary(teacher, saved(make_tokenizer(), "student"))


def test_different_preprocessing_of_one_vocabulary_is_noticed(saved):
    def lower(content):
        content["normalizer"] = {"type": "Lowercase"}

    teacher = edit_tokenizer(saved(make_tokenizer(), "teacher"), lower)
    with pytest.raises(ModelError, match=r"token 0 of .The quick"):
        check_same_vocabulary(teacher, saved(make_tokenizer(), "student"))
