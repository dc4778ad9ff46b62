"""Prompt sources: formats, columns, bad records, and the held-out split."""

import json
import re
import shlex
import sys
from collections import Counter
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.config import DataConfig
from npd.config.load import load_config
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.prompts import encode_prompts, load_prompts
from npd.errors import ConfigError, DataError
from npd.types import Message, Prompt
from tiny_model import make_tokenizer

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
GOOD = {"prompt": "hi"}


@pytest.fixture
def jsonl(tmp_path):
    """Write records (or raw lines) to a JSONL file; returns a function that gives its path."""

    def write(*records, name="train.jsonl"):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write


def load(path, **kwargs):
    """The prompts of a file, none held out unless asked for."""
    return load_prompts(DataConfig(train=path, **{"heldout_size": 0, **kwargs}))


def one(path, **kwargs):
    (prompt,) = load(path, **kwargs).train
    return prompt


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_plain_prompt_with_everything(jsonl):
    path = jsonl({"prompt": "2+2?", "completion": "4", "answer": "4", "teacher": "big"})
    assert one(path) == Prompt(0, text="2+2?", completion="4", answer="4", teacher="big")


def test_prompt_as_messages(jsonl):
    path = jsonl({"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ASSISTANT]})
    messages = (Message("system", "s"), Message("user", "2+2?"))
    assert one(path) == Prompt(0, messages=messages, completion="4")


def test_messages_that_end_with_the_assistant_hold_the_completion(jsonl):
    turns = [USER, ASSISTANT, {"role": "user", "content": "3+3?"}]
    ended = {"messages": [*turns, {"role": "assistant", "content": "6"}]}
    messages = (Message("user", "2+2?"), Message("assistant", "4"), Message("user", "3+3?"))
    assert one(jsonl(ended)) == Prompt(0, messages=messages, completion="6")
    assert one(jsonl({"messages": turns})) == Prompt(0, messages=messages)


def test_prompt_beside_messages_is_refused_until_one_is_chosen(jsonl):
    path = jsonl({"prompt": "p", "messages": [USER, ASSISTANT]})
    with pytest.raises(DataError, match=r"jsonl:1: .*\(`messages`\) and prompts \(`prompt`\)"):
        load(path, on_bad_record="drop")
    assert one(path, format="prompt") == Prompt(0, text="p")
    for chosen in ({"format": "messages"}, {"columns": {"messages": "messages"}}):
        assert one(path, **chosen).completion == "4"
    assert one(path, leave_out=("messages",)) == Prompt(0, text="p")


def test_renamed_columns(jsonl):
    path = jsonl({"question": "2+2?", "answer": "so it is 4 #### 4"})
    columns = {"prompt": "question", "completion": "answer", "answer": "answer"}
    expected = Prompt(0, text="2+2?", completion="so it is 4 #### 4", answer="so it is 4 #### 4")
    assert one(path, columns=columns) == expected


def test_numeric_answers_become_text(jsonl):
    assert one(jsonl({"prompt": "p", "answer": 4})).answer == "4"
    assert one(jsonl({"prompt": "p", "answer": 0.5})).answer == "0.5"


def test_nulls_are_absent(jsonl):
    record = {"prompt": None, "messages": [USER], "completion": None, "teacher": None}
    assert one(jsonl(record)) == Prompt(0, messages=(Message("user", "2+2?"),))
    record = {"prompt": "p", "tools": "null", "documents": "", "chat_template_kwargs": "null"}
    assert one(jsonl(record)) == Prompt(0, text="p")


def test_blank_lines_byte_order_mark_and_unicode(jsonl):
    path = jsonl(b'\xef\xbb\xbf{"prompt": "a"}', b"", b"   ", '{"prompt": "é 你好"}'.encode())
    assert texts(load(path).train) == ["a", "é 你好"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["alpaca.json", "alpaca.jsonl"])
def test_json_list(tmp_path, indent, start, name):
    path = tmp_path / name
    records = [GOOD, {"prompt": "a\u2028b"}, {"prompt": ""}]
    path.write_bytes(start + json.dumps(records, indent=indent).encode())
    with pytest.raises(DataError, match=r"alpaca\.jsonl? item 3: prompt is empty"):
        load(str(path))
    assert texts(load(str(path), on_bad_record="drop").train) == ["hi", "a\u2028b"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        DataError, match=r"alpaca\.jsonl?(:[12])?: not JSON .*: write one JSON object per line"
    ):
        load(str(path), on_bad_record="drop")
    path.write_text(json.dumps(GOOD) + "\n")
    assert texts(load(str(path)).train) == ["hi"]


def test_a_line_that_is_a_list_is_no_list_of_records(jsonl):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    no_record = r"1: a record must be a JSON object, not a list"
    for path in (jsonl(turns), jsonl(turns, GOOD), jsonl([], GOOD), jsonl([1, 2], GOOD), jsonl([])):
        with pytest.raises(DataError, match=no_record):
            load(path)
    for path in (jsonl(turns, GOOD), jsonl([], GOOD), jsonl([GOOD], GOOD)):
        assert texts(load(path, on_bad_record="drop").train) == ["hi"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": [USER], "completion": "4"}, {"prompt": [USER, ASSISTANT, USER]}]
    path = str(tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(records), path)
    first, second = load(path).train
    assert first == Prompt(0, messages=(Message("user", "2+2?"),), completion="4")
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]


def test_answers_as_parquet_has_them(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    for answer, text in ((Decimal("1.50"), "1.50"), (2**60, str(2**60)), (0.5, "0.5")):
        pq.write_table(pa.Table.from_pylist([{"prompt": "p", "answer": answer}]), path)
        assert one(str(path)).answer == text
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "answer": date(2024, 1, 2)}]), path)
    with pytest.raises(DataError, match=r"answer must be text or a number, .*leave_out=\[answer\]"):
        load(str(path))


def test_parquet_errors_name_the_row_and_the_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "train.parquet")
    pq.write_table(pa.table({"body": ["a"], "prompt": [None], "n": [1]}), path)
    with pytest.raises(DataError, match=r"train\.parquet row 1: .*columns are body, prompt, n"):
        load(path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet as Parquet"):
        load(path)


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (b"{oops", "unreadable", "not JSON"),
        (b"\xff\xfe", "unreadable", "not UTF-8"),
        (["a"], "unreadable", "must be a JSON object, not a list"),
        ({"problem": "a"}, "no_prompt", r"columns are problem: set .*prompt: problem"),
        ({}, "no_prompt", "columns are none"),
        ({"prompt": ""}, "empty_prompt", "prompt is empty"),
        ({"prompt": " \n"}, "empty_prompt", "prompt is empty"),
        ({"prompt": []}, "empty_prompt", "no user message"),
        ({"messages": [ASSISTANT]}, "empty_prompt", "no user message"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty_prompt", "no user message"),
        ({"prompt": 3}, "not_text", "prompt must be text or a list of messages, not 3"),
        ({"messages": "hi"}, "not_text", "messages must be a list of messages, not 'hi'"),
        ({"prompt": "\ud800"}, "not_text", "not valid Unicode"),
        ({"prompt": [{"says": "human", "value": "x"}]}, "bad_messages", "`role` and `content`"),
        (
            {"prompt": [{"from": "alien", "value": "x"}]},
            "bad_messages",
            "from 'alien', but `from` must be one of",
        ),
        ({"prompt": ["hi"]}, "bad_messages", "`role` and `content`"),
        ({"prompt": [{"role": "user", "content": None}]}, "not_text", "must be text"),
        ({"prompt": [USER, ASSISTANT]}, "bad_messages", "ends with an assistant turn"),
        ({"prompt": "a", "completion": ""}, "empty_completion", "completion is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "empty_completion",
            "the last message is empty: remove it",
        ),
        ({"prompt": "a", "completion": 3}, "not_text", "completion must be text or a list"),
        ({"prompt": "a", "completion": [USER]}, "bad_messages", "one assistant message"),
        ({"prompt": "a", "completion": []}, "bad_messages", "one assistant message"),
        ({"prompt": "a", "answer": ["4"]}, "not_text", r"number, not .*leave_out=\[answer\]"),
        ({"prompt": "a", "answer": True}, "not_text", "answer must be text or a number"),
        ({"prompt": "a", "answer": {"value": "4"}}, "not_text", "answer must be text or a number"),
        ({"id": "7", "data": ["q", "a"]}, "no_prompt", "give each record a `prompt` of text"),
        ({"chosen": "H: a", "rejected": "H: b"}, "no_prompt", "give each record a `prompt`"),
        (
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            "bad_messages",
            "two assistant turns: keep one",
        ),
        ({"data": [GOOD]}, "no_prompt", "give each record a `prompt` of text"),
        ({"prompt": "a", "answer": ""}, "empty", "answer is empty"),
        (b'{"prompt": "a", "answer": Infinity}', "not_text", "finite number"),
        ({"prompt": "a", "teacher": 2}, "not_text", "teacher must be text"),
        (b'{"prompt": "a", "prompt": "b"}', "unreadable", "'prompt' is twice"),
        (
            {"messages": [USER, ASSISTANT], "completion": "5"},
            "two_completions",
            r"data\.leave_out=\[completion\]",
        ),
        ({"prompt": "a", "tools": "{oops"}, "bad_tools", "tools is text but not JSON"),
        ({"prompt": "a", "tools": {"name": "f"}}, "bad_tools", "must be a list of objects"),
        (
            {"prompt": "a", "chat_template_kwargs": {"tokenize": True}},
            "bad_tools",
            "cannot set 'tokenize'",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "not_text",
            "is not plain text",
        ),
    ],
)
def test_bad_records_name_their_line_or_are_counted(jsonl, record, reason, message):
    is_conversation = isinstance(record, dict) and "messages" in record
    good = {"messages": [USER]} if is_conversation else GOOD
    path = jsonl(good, record, good)
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "data.on_bad_record: drop" in str(caught.value)
    found = load(path, on_bad_record="drop")
    assert [prompt.place[-1] for prompt in found.train] == ["1", "3"]
    assert [prompt.index for prompt in found.train] == [0, 1]
    assert found.dropped == {reason: 1}


def test_dropping_everything_shows_why(jsonl):
    with pytest.raises(
        DataError, match=r"has no prompts.*jsonl:1: there is no `prompt`.*problem, x"
    ):
        load(jsonl({"problem": "a", "x": 1}), on_bad_record="drop")


def test_renaming_a_column_that_is_not_there_names_the_nearest(jsonl):
    path = jsonl({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"no column 'qestion'.*did you mean 'question'.*answer"):
        load(path, columns={"prompt": "qestion"})
    with pytest.raises(DataError, match=r"data\.columns gives for answer"):
        load(path, columns={"prompt": "question", "answer": "zzz"})


def test_renaming_to_a_column_npd_does_not_have(jsonl):
    with pytest.raises(ConfigError, match=r"'promt', which is not a column.*did you mean prompt"):
        load(jsonl(GOOD), columns={"promt": "question"})


HINTS = [
    ({"problem": "2+2?", "answer": "4"}, Prompt(0, text="2+2?", completion="4", answer="4")),
    ({"prompt": json.dumps([USER])}, Prompt(0, messages=(Message("user", "2+2?"),))),
    ({"text": "once upon a time"}, Prompt(0, text="once upon a time")),
    (
        {"source": "web", "chosen": [USER, ASSISTANT], "rejected": [USER]},
        Prompt(0, messages=(Message("user", "2+2?"),), completion="4"),
    ),
    (
        {"prompt_id": "x", "thread": [USER, ASSISTANT]},
        Prompt(0, messages=(Message("user", "2+2?"),), completion="4"),
    ),
    ({"prompt": "2+2?", "answer": ["4"]}, Prompt(0, text="2+2?")),
    ({"id": "3", "body": "hello"}, Prompt(0, text="hello")),
    ({"id": 3, "body": "hello"}, Prompt(0, text="hello")),
    ({"null": "hello", "say: what": "x"}, Prompt(0, text="hello")),
    ({"say: what": "hello"}, Prompt(0, text="hello")),
    (
        {"prompt": [USER, ASSISTANT]},
        Prompt(0, messages=(Message("user", "2+2?"),), completion="4"),
    ),
]


@pytest.mark.parametrize(("record", "expected"), HINTS)
def test_the_hint_for_other_formats_works_as_it_is_typed(jsonl, record, expected, tmp_path):
    path = jsonl(record)
    with pytest.raises(DataError) as caught:
        load(path)
    sets = re.findall(r"--set '[^']*'", str(caught.value))
    given = [shlex.split(each)[1] for each in sets][-1]
    settings = tmp_path / "run.yaml"
    settings.write_text(f"preset: npd\nstudent: s\nteacher: t\ndata: {{train: {path}}}\n")
    config = load_config(str(settings), [given]).config.data
    assert load_prompts(config.model_copy(update={"heldout_size": 0})).train == [expected]


def test_columns_that_hold_something_and_are_not_used_are_told(jsonl):
    record = {"prompt": "p", "context": "long", "id": 3, "empty": "", "no": None}
    found = load(jsonl(record, {"prompt": "q", "id": 4}))
    assert found.unread == {"context": 1, "id": 2}
    assert load(jsonl(record), leave_out=("id",)).unread == {"context": 1}
    both = jsonl({"prompt": "p", "messages": [USER]})
    assert load(both, format="prompt").unread == {"messages": 1}
    alpaca = jsonl({"instruction": "i", "input": "x", "output": "o"})
    for columns in ({"prompt": "instruction", "completion": "output"}, {}):
        found = load(alpaca, columns=columns)
        assert (found.unread, found.joined) == ({}, 1)


def test_system_column_is_the_first_message(jsonl):
    system = Message("system", "be brief")
    assert one(jsonl({"prompt": "p", "system": "be brief"})).messages == (
        system,
        Message("user", "p"),
    )
    assert one(jsonl({"prompt": [USER], "system": "be brief"})).messages[0] == system
    twice = {"prompt": [{"role": "system", "content": "x"}, USER], "system": "be brief"}
    with pytest.raises(DataError, match="different system messages"):
        load(jsonl(twice))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_keys_of_messages_and_template_columns_are_kept_as_they_are(jsonl):
    turns = [
        USER | {"name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "x1"},
        {"role": "assistant", "content": "4", "reasoning_content": "one more"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {
        "messages": turns,
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    prompt = one(jsonl(record))
    assert prompt.messages == (
        Message("user", "2+2?", {"name": "ann"}),
        Message("assistant", None, {"tool_calls": [CALL]}),
        Message("tool", "3", {"tool_call_id": "x1"}),
    )
    assert prompt.completion == Message("assistant", "4", {"reasoning_content": "one more"})
    assert prompt.template_args == {"tools": tools, "enable_thinking": False}
    bare = one(jsonl(record), leave_out=("name", "reasoning_content", "tools"))
    assert (bare.messages[0].extra, bare.completion) == ({}, "4")
    assert bare.template_args == {"enable_thinking": False}


def test_answers_that_call_tools_need_no_text(jsonl):
    for content in ("", None):
        called = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        expected = Message("assistant", content, {"tool_calls": [CALL]})
        assert one(jsonl({"messages": [USER, called]})).completion == expected
        assert one(jsonl({"prompt": "p", "completion": [called]})).completion == expected


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("human", "gpt"), ("User", "Assistant"), ("user", "model"), ("prompter", "bot")],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_speakers_by_other_names(jsonl, asks, answers, keys):
    role, content = keys
    turns = [{role: asks, content: "2+2?"}, {role: answers, content: "4"}]
    expected = Prompt(0, messages=(Message("user", "2+2?"),), completion="4")
    assert one(jsonl({"messages": turns})) == expected


def test_roles_of_templates_own_stay_as_they_are(jsonl):
    turns = [USER, {"role": "observation", "content": "4"}, {"role": "ipython", "content": "5"}]
    found = one(jsonl({"messages": turns})).messages
    assert [message.role for message in found] == ["user", "observation", "ipython"]


def test_text_parts_are_one_text(jsonl):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert one(jsonl({"messages": [{"role": "user", "content": parts}]})) == Prompt(
        0, messages=(Message("user", "2+2?"),)
    )


def test_what_data_frames_write_for_nothing_is_nothing(jsonl):
    record = b'{"prompt": "p", "completion": NaN, "answer": NaN, "teacher": NaN}'
    assert one(jsonl(record)) == Prompt(0, text="p")


def test_nulls_that_arrow_adds_are_no_keys(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, USER]
    rows = [{"prompt": [USER]}, {"prompt": [USER, *calls]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    first, second = load(str(tmp_path / "calls.parquet")).train
    assert first.messages == (Message("user", "2+2?"),)
    assert second.messages[1] == Message("assistant", None, {"tool_calls": [CALL]})


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="two columns called 'prompt'"):
        load(str(tmp_path / "twice.parquet"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl has no prompts: it is empty"):
        load(str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("path", ["none.jsonl", "none.csv", "./none", "/no/where", "a/b/c"])
def test_missing_file(path):
    with pytest.raises(DataError, match=r"data file .* does not exist .*check the path"):
        load(path)


def test_unknown_format(jsonl):
    with pytest.raises(DataError, match=r"is none of \.jsonl, .* and \.parquet .*: convert"):
        load(jsonl(GOOD, name="train.txt"))


def test_train_is_not_set():
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        load_prompts(DataConfig())


def test_unreachable_dataset_is_one_line():
    with pytest.raises(DataError, match=r"nobody/nothing:main \(split train\)") as caught:
        load("nobody/nothing:main")
    assert "\n" not in str(caught.value)


def test_missing_datasets_library_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'npd\[datasets\]'"):
        load("nobody/nothing")


def test_dataset_directory_through_the_datasets_library(jsonl, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl({"question": "a"}, {"question": "b"}, name="set/train.jsonl")
    jsonl({"question": "c"}, name="set/test.jsonl")
    source, columns = str(tmp_path / "set"), {"prompt": "question"}
    found = load(source, heldout=source, columns=columns)
    assert texts(found.train) == ["a", "b"]
    assert texts(found.heldout) == ["c"]
    with pytest.raises(DataError, match=r'Unknown split "dev"'):
        load(source, split="dev", columns=columns)
    with pytest.raises(DataError, match=r"set \(train\) row 1: there is no `messages`"):
        load(source, format="messages")


def test_heldout_is_drawn_by_seed_before_the_limit(jsonl):
    path = jsonl(*({"prompt": str(i)} for i in range(100)))
    found = load(path, heldout_size=10, limit=50)
    drawn = texts(found.heldout)
    assert drawn == sorted(drawn, key=int)
    assert len(set(drawn)) == 10
    assert drawn != [str(i) for i in range(90, 100)], "the tail of a sorted file is no sample of it"
    assert texts(found.train) == [str(i) for i in range(100) if str(i) not in drawn][:50]
    assert [p.index for p in (*found.train, *found.heldout)] == list(range(60))
    again, other = (
        load_prompts(DataConfig(train=path, heldout_size=10), seed).heldout for seed in (0, 1)
    )
    assert texts(again) == drawn != texts(other)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (19, 1), (60, 6), (640, 64), (1000, 64)])
def test_a_tenth_is_held_out_and_64_at_most(jsonl, count, size):
    found = load(jsonl(*({"prompt": str(i)} for i in range(count))), heldout_size=None)
    assert (len(found.heldout), len(found.train)) == (size, count - size)


def test_heldout_file(jsonl):
    train, test = jsonl({"prompt": "a"}, {"prompt": "b"}), jsonl({"prompt": "c"}, name="t.jsonl")
    found = load(train, heldout=test, heldout_size=64)
    assert texts(found.train) == ["a", "b"]
    assert texts(found.heldout) == ["c"]
    assert found.heldout[0].index == 2


def test_heldout_prompts_are_never_trained_on(jsonl):
    train = jsonl({"prompt": "same"}, {"prompt": "a"}, {"prompt": [USER]}, {"prompt": "same"})
    for seed in range(4):
        found = load_prompts(DataConfig(train=train, heldout_size=1), seed)
        asked = [p.text or p.messages[0].content for p in (*found.train, *found.heldout)]
        assert (len(set(asked)), found.dropped) in ((3, {}), (3, {"in_heldout": 1}))
        assert not {p.text for p in found.heldout if p.text} & set(texts(found.train))
    test = jsonl({"prompt": "2+2?"}, name="test.jsonl")
    found = load(train, heldout=test)
    assert texts(found.train) == ["same", "a", "same"]
    with pytest.raises(DataError, match="every training prompt is also held out"):
        load(train, heldout=train)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_prompts_to_hold_out(jsonl, count):
    path = jsonl(*({"prompt": str(i)} for i in range(count)))
    with pytest.raises(
        DataError, match=rf"has {count} prompts?, too few .*lower data.heldout_size"
    ):
        load(path, heldout_size=3)


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    size=st.integers(0, 4),
    limit=st.one_of(st.none(), st.integers(1, 6)),
)
def test_split_loses_and_mixes_nothing(tmp_path_factory, words, size, limit):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    try:
        found = load(str(path), heldout_size=size, limit=limit)
    except DataError:
        # Too few, or every word that is left is held out too: then there are few different ones.
        assert len(words) <= size or len(set(words)) <= size
        return
    heldout = texts(found.heldout)
    assert len(heldout) == size
    assert not Counter(heldout) - Counter(words)
    expected = [word for word in words if word not in heldout]
    assert texts(found.train) == expected[:limit]
    indices = [p.index for p in (*found.train, *found.heldout)]
    assert indices == list(range(len(indices)))
    lost = len(words) - size - len(expected)
    assert found.dropped == ({"in_heldout": lost} if lost else {})


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(make_tokenizer())


def test_encode_prompts_keeps_order(chat):
    prompts = [Prompt(i, text=text) for i, text in enumerate("abc")]
    encoded, dropped = encode_prompts(prompts, chat, DataConfig())
    assert [e.index for e in encoded] == [0, 1, 2]
    assert encoded[1].prompt_ids.tolist() == chat.encode(prompts[1]).prompt_ids.tolist()
    assert dropped == {}
    assert encode_prompts([], chat, DataConfig()) == ([], {})


def test_prompts_that_the_template_refuses_one_and_all(chat):
    prompts = [Prompt(0, text="hi", template_args={"tools": [{"a": 1}]})]
    with pytest.raises(DataError, match=r"drops `tools`.*on_bad_record: drop\)$"):
        encode_prompts(prompts, chat, DataConfig())
    with pytest.raises(DataError, match=r"every prompt was dropped.*writes it$"):
        encode_prompts(prompts, chat, DataConfig(on_bad_record="drop"))


def test_long_prompts_stop_with_the_longest_or_are_counted(chat):
    prompts = [Prompt(5, text="a"), Prompt(6, text="xq" * 40), Prompt(7, text="xq" * 60)]
    longest = len(chat.encode(prompts[2]).prompt_ids)
    config = DataConfig(max_prompt_tokens=len(chat.encode(prompts[0]).prompt_ids))
    pattern = rf"2 of 3 prompts .*longest has {longest}: prompt 7, 'xq.*on_long_prompt: drop"
    with pytest.raises(DataError, match=pattern):
        encode_prompts(prompts, chat, config)
    dropping = config.model_copy(update={"on_long_prompt": "drop"})
    encoded, dropped = encode_prompts(prompts, chat, dropping)
    assert [e.index for e in encoded] == [5], "a prompt of exactly the limit fits"
    assert dropped == {"long_prompt": 2}


def test_long_conversation_names_its_last_message(chat):
    prompt = Prompt(0, messages=(Message("user", "u" * 30), Message("user", "last" * 30)))
    with pytest.raises(DataError, match="prompt 0, 'lastlast"):
        encode_prompts([prompt], chat, DataConfig(max_prompt_tokens=10))
