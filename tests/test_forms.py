"""Forms of records: each is recognised by its keys, the same in all, and refused where unclear."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import FORMS, write
from npd.config import DataConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.prompts import encode_prompts, load_prompts
from npd.errors import ConfigError, DataError
from npd.types import Message, Prompt
from tiny_model import make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TITLES = {
    "messages": "conversations",
    "text parts": "conversations",
    "prompt": "prompts",
    "prompt of messages": "prompts",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions",
    "question": "questions and answers",
    "question with response": "questions and answers",
}
CONVERSATIONS = [("", "What is 2 + 2?", "4"), ("be brief", "Add one.\n\n3", "It is 4.\n")]


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(make_tokenizer())


def load(path, **kwargs):
    return load_prompts(DataConfig(train=path, **{"heldout_size": 0, **kwargs}))


def ids_of(found, chat):
    encoded, _ = encode_prompts(found.train, chat, DataConfig())
    each = ((e.prompt_ids, e.header_ids, e.completion_ids) for e in encoded)
    return [tuple(ids.tolist() for ids in three) for three in each]


def refusal(path, **kwargs):
    with pytest.raises(DataError) as caught:
        load(path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text.replace(path, "train")) <= 300
    return text


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_recognised_and_named(tmp_path, form):
    found = load(write(tmp_path, [FORMS[form](*each) for each in CONVERSATIONS]))
    assert found.sources[0].form == TITLES[form]
    assert found.unread == {}
    assert [prompt.completion for prompt in found.train] == ["4", "It is 4.\n"]


texts = st.text("ab? \n", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.just(""), texts), texts, texts), min_size=1, max_size=4))
def test_the_same_conversations_in_all_forms_give_equal_ids(tmp_path_factory, chat, conversations):
    folder = tmp_path_factory.mktemp("forms")
    expected = None
    for form, record in FORMS.items():
        if form == "alpaca" and any("\n\n" in asked for _, asked, _ in conversations):
            continue  # it would be divided into two parts that may be blank
        found = ids_of(load(write(folder, [record(*each) for each in conversations])), chat)
        expected = expected or found
        assert found == expected, form


def test_a_question_s_answer_is_compared_and_its_response_trained_on(tmp_path):
    path = write(tmp_path, [{"question": "2+2?", "answer": "4", "response": "It is 4."}])
    expected = Prompt(0, text="2+2?", completion="It is 4.", answer="4")
    assert load(path).train == [expected]
    path = write(tmp_path, [{"question": "2+2?", "answer": "so #### 4"}])
    assert load(path).train == [Prompt(0, text="2+2?", completion="so #### 4", answer="so #### 4")]


def test_alpaca_s_input_is_put_below_the_instruction(tmp_path):
    path = write(tmp_path, [{"instruction": "Add one", "input": "3", "output": "4"}])
    found = load(path)
    assert (found.train, found.joined) == ([Prompt(0, text="Add one\n\n3", completion="4")], 1)


def test_sharegpt_with_system_and_tools_columns_and_tool_turns(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "let me see"},
        {"from": "tool", "value": "4"},
        {"from": "gpt", "value": "it is 4"},
    ]
    record = {"conversations": turns, "system": "be brief", "tools": json.dumps(tools)}
    (prompt,) = load(write(tmp_path, [record])).train
    roles = [message.role for message in prompt.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert (prompt.completion, prompt.template_args) == ("it is 4", {"tools": tools})


def test_columns_may_name_a_part_of_a_recognised_form(tmp_path):
    path = write(tmp_path, [{"question": "2+2?", "answer": "4", "reply": "It is 4."}])
    expected = Prompt(0, text="2+2?", completion="It is 4.", answer="4")
    found = load(path, columns={"completion": "reply"})
    assert (found.train, found.sources[0].form) == ([expected], "questions and answers")
    path = write(tmp_path, [{"dialog": [USER, ASSISTANT], "prompt": "p"}])
    found = load(path, columns={"messages": "dialog"})
    assert found.train == [Prompt(0, (Message("user", "2+2?"),), completion="4")]
    assert found.sources[0].form == "conversations (`dialog`, by data.columns)"


AMBIGUOUS = [
    ({"prompt": "p", "messages": [USER]}, ("messages", "prompt")),
    ({"instruction": "i", "conversations": [USER]}, ("sharegpt", "alpaca")),
    ({"question": "q", "prompt": "p"}, ("prompt", "question")),
    ({"question": "q", "instruction": "i"}, ("alpaca", "question")),
]


@pytest.mark.parametrize(("record", "forms"), AMBIGUOUS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_record_of_two_forms_is_refused_whatever_the_order_of_its_keys(
    tmp_path, record, forms, is_turned
):
    if is_turned:
        record = dict(reversed(record.items()))
    path = write(tmp_path, [record])
    # A setting for bad records does not choose for it.
    for setting in ("error", "drop"):
        said = refusal(path, on_bad_record=setting)
        assert said.startswith(f"{path}:1: the record can be read as ")
        assert said.endswith(" or ".join(f"--set data.format={form}" for form in forms))
    read = [load(path, format=form).train[0] for form in forms]
    assert read[0] != read[1]


def test_an_empty_column_beside_a_full_one_decides_nothing(tmp_path):
    records = [{"prompt": empty, "messages": [USER]} for empty in ("", None)]
    assert len(load(write(tmp_path, records)).train) == 2


def test_a_file_of_two_forms_is_refused_with_the_line_where_it_changes(tmp_path):
    path = write(tmp_path, [{"prompt": "a"}, {"id": 7}, {"question": "b", "answer": "c"}])
    for setting in ("error", "drop"):
        said = refusal(path, on_bad_record=setting)
        if setting == "error":
            assert f"{path}:2: there is no `prompt`" in said
    assert said == (
        f"{path}:3: the record has questions and answers (`question`), and those before have "
        "prompts: split the file by form (data.mix reads several), or read one form with --set "
        "data.format=prompt"
    )
    found = load(path, on_bad_record="drop", format="prompt")
    assert (len(found.train), found.dropped) == (1, {"no_prompt": 2})


@pytest.mark.parametrize(
    ("record", "format", "says"),
    [
        ({"question": "q"}, "alpaca", "there is no `instruction`, as Alpaca instructions have"),
        ({"instruction": None}, "alpaca", "`instruction` is null"),
        ({"question": " "}, "auto", "question is empty"),
        ({"conversations": "hi"}, "auto", "conversations must be a list of messages, not 'hi'"),
        ({"conversations": [{"from": "x", "value": "y"}]}, "auto", "`from` must be one of"),
        ({"question": "q", "answer": "a", "images": ["x.png"]}, "auto", r"leave_out=[images]"),
        ({"instruction": "i", "output": ""}, "auto", "output is empty"),
        ({"prompt": str([USER])}, "auto", "prompt is text that holds a list of messages"),
        ({"prompt": json.dumps([USER])}, "auto", "'data.columns={messages: prompt}'"),
        ({"messages": str([USER])}, "auto", "messages is text but not JSON"),
    ],
)
def test_bad_records_of_a_form_name_line_column_and_remedy(tmp_path, record, format, says):
    path = write(tmp_path, [record])
    said = refusal(path, format=format)
    assert said.startswith(f"{path}:1: ")
    assert says in said


def test_images_are_refused_as_parts_and_ignored_where_told(tmp_path):
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "a"}]
    record = {"messages": [{"role": "user", "content": parts}]}
    assert "is not plain text" in refusal(write(tmp_path, [record]))
    path = write(tmp_path, [{"prompt": "p", "image": "x.png"}])
    assert load(path, leave_out=("image",)).train == [Prompt(0, text="p")]


@pytest.mark.parametrize(
    "data",
    [
        {"columns": {"prompt": "a", "messages": "b"}},
        {"columns": {"messages": "b"}, "format": "alpaca"},
        {"columns": {"prompt": "b"}, "format": "sharegpt"},
    ],
)
def test_columns_that_contradict_the_form_are_refused(tmp_path, data):
    with pytest.raises(ConfigError, match=r"data\.columns names"):
        load(write(tmp_path, [{"prompt": "p"}]), **data)
