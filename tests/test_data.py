"""Prompt sources: formats, columns, bad records, and the held-out split."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from npd.chat import Chat
from npd.config import DataConfig
from npd.data import encode_prompts, load_prompts
from npd.errors import ConfigError, DataError
from npd.types import Message, Prompt

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


def test_prompt_goes_before_messages_unless_columns_says_otherwise(jsonl):
    path = jsonl({"prompt": "p", "messages": [USER, ASSISTANT]})
    assert one(path) == Prompt(0, text="p")
    assert one(path, columns={"messages": "messages"}).completion == "4"


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


def test_blank_lines_byte_order_mark_and_unicode(jsonl):
    path = jsonl(b'\xef\xbb\xbf{"prompt": "a"}', b"", b"   ", '{"prompt": "é 你好"}'.encode())
    assert texts(load(path).train) == ["a", "é 你好"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": [USER], "completion": "4"}, {"prompt": [USER, ASSISTANT, USER]}]
    path = str(tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(records), path)
    first, second = load(path).train
    assert first == Prompt(0, messages=(Message("user", "2+2?"),), completion="4")
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]


def test_parquet_errors_name_the_row_and_the_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "train.parquet")
    pq.write_table(pa.table({"question": ["a"], "prompt": [None], "n": [1]}), path)
    with pytest.raises(DataError, match=r"train\.parquet row 1: .*columns are question, prompt, n"):
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
        ({"question": "a"}, "no_prompt", r"columns are question: set .*prompt: question"),
        ({}, "no_prompt", "its columns are none"),
        ({"prompt": ""}, "empty_prompt", "prompt is empty"),
        ({"prompt": " \n"}, "empty_prompt", "prompt is empty"),
        ({"prompt": []}, "empty_prompt", "no user message"),
        ({"messages": [ASSISTANT]}, "empty_prompt", "no user message"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty_prompt", "no user message"),
        ({"prompt": 3}, "not_text", "prompt must be text or a list of messages, not 3"),
        ({"messages": "hi"}, "not_text", "messages must be a list of messages, not 'hi'"),
        ({"prompt": "\ud800"}, "not_text", "half a character"),
        ({"prompt": [{"from": "human", "value": "x"}]}, "bad_messages", "`role` and `content`"),
        ({"prompt": ["hi"]}, "bad_messages", "`role` and `content`"),
        ({"prompt": [{"role": "user", "content": None}]}, "not_text", "must be text"),
        ({"prompt": [USER, ASSISTANT]}, "bad_messages", "ends with the assistant's turn"),
        ({"prompt": "a", "completion": ""}, "empty_completion", "completion is empty"),
        ({"prompt": "a", "completion": 3}, "not_text", "completion must be text or a list"),
        ({"prompt": "a", "completion": [USER]}, "bad_messages", "one assistant message"),
        ({"prompt": "a", "completion": []}, "bad_messages", "one assistant message"),
        ({"prompt": "a", "answer": ["4"]}, "not_text", "answer must be text"),
        ({"prompt": "a", "answer": True}, "not_text", "answer must be text"),
        ({"prompt": "a", "teacher": 2}, "not_text", "teacher must be text"),
    ],
)
def test_bad_records_name_their_line_or_are_counted(jsonl, record, reason, message):
    path = jsonl(GOOD, record, {"prompt": "bye"})
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "data.on_bad_record: drop" in str(caught.value)
    found = load(path, on_bad_record="drop")
    assert texts(found.train) == ["hi", "bye"]
    assert [prompt.index for prompt in found.train] == [0, 1]
    assert found.dropped == {reason: 1}


def test_dropping_everything_shows_why(jsonl):
    with pytest.raises(DataError, match=r"holds no prompts.*jsonl:1: no `prompt`.*question, x"):
        load(jsonl({"question": "a", "x": 1}), on_bad_record="drop")


def test_renaming_a_column_that_is_not_there_names_the_nearest(jsonl):
    path = jsonl({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"no column 'qestion'.*did you mean 'question'.*answer"):
        load(path, columns={"prompt": "qestion"})
    with pytest.raises(DataError, match=r"data\.columns gives for answer"):
        load(path, columns={"prompt": "question", "answer": "zzz"})


def test_renaming_to_a_column_npd_does_not_have(jsonl):
    with pytest.raises(ConfigError, match=r"'promt', which is no column.*did you mean prompt"):
        load(jsonl(GOOD), columns={"promt": "question"})


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl holds no prompts: it is empty"):
        load(str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("path", ["none.jsonl", "none.csv", "./none", "/no/where", "a/b/c"])
def test_missing_file(path):
    with pytest.raises(DataError, match=r"data file .* does not exist .*check the path"):
        load(path)


def test_unknown_format(jsonl):
    with pytest.raises(DataError, match=r"neither \.jsonl nor \.parquet: convert"):
        load(jsonl(GOOD, name="train.csv"))


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
    with pytest.raises(DataError, match=r"set \(train\) row 1: no `prompt`"):
        load(source)


def test_heldout_comes_off_the_end_before_the_limit(jsonl):
    path = jsonl(*({"prompt": str(i)} for i in range(10)))
    found = load(path, heldout_size=3, limit=4)
    assert texts(found.train) == ["0", "1", "2", "3"]
    assert texts(found.heldout) == ["7", "8", "9"]
    assert [p.index for p in (*found.train, *found.heldout)] == list(range(7))


def test_heldout_file(jsonl):
    train, test = jsonl({"prompt": "a"}, {"prompt": "b"}), jsonl({"prompt": "c"}, name="t.jsonl")
    found = load(train, heldout=test, heldout_size=64)
    assert texts(found.train) == ["a", "b"]
    assert texts(found.heldout) == ["c"]
    assert found.heldout[0].index == 2


def test_heldout_prompts_are_never_trained_on(jsonl):
    train = jsonl({"prompt": "same"}, {"prompt": "a"}, {"prompt": [USER]}, {"prompt": "same"})
    found = load(train, heldout_size=1)
    assert texts(found.train) == ["a", None]
    assert found.dropped == {"in_heldout": 1}
    test = jsonl({"prompt": "2+2?"}, name="test.jsonl")
    found = load(train, heldout=test)
    assert texts(found.train) == ["same", "a", "same"]
    with pytest.raises(DataError, match="every training prompt is among the held-out"):
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
    at = max(0, len(words) - size)
    heldout = words[at:]
    expected = [word for word in words[:at] if word not in heldout]
    if not expected:
        with pytest.raises(DataError):
            load(str(path), heldout_size=size)
        return
    found = load(str(path), heldout_size=size, limit=limit)
    assert texts(found.heldout) == heldout
    assert texts(found.train) == expected[:limit]
    indices = [p.index for p in (*found.train, *found.heldout)]
    assert indices == list(range(len(indices)))
    lost = len(words) - size - len(expected)
    assert found.dropped == ({"in_heldout": lost} if lost else {})


@pytest.fixture(scope="module")
def chat():
    return Chat(make_tokenizer())


def test_encode_prompts_keeps_order(chat):
    prompts = [Prompt(i, text=text) for i, text in enumerate("abc")]
    encoded, dropped = encode_prompts(prompts, chat, DataConfig())
    assert [e.index for e in encoded] == [0, 1, 2]
    assert encoded[1].prompt_ids.tolist() == chat.encode(prompts[1]).prompt_ids.tolist()
    assert dropped == {}
    assert encode_prompts([], chat, DataConfig()) == ([], {})


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
