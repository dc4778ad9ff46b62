"""Data files: every format and compression, folders of shards, and what is broken, in one line."""

import tracemalloc

import pytest

from data_files import COMPRESSIONS, KINDS, csv_of, jsonl, write
from npd.config import DataConfig
from npd.data.formats import file_records
from npd.data.prompts import load_prompts
from npd.data.sources import data_files
from npd.errors import DataError

RECORDS = [
    {"prompt": "é 你好", "completion": "a,b"},
    {"prompt": 'two\nlines, "quoted"', "completion": "\ttab"},
]


def load(path, **kwargs):
    return load_prompts(DataConfig(train=str(path), **{"heldout_size": 0, **kwargs}))


def pairs(found):
    return [(prompt.text, prompt.completion) for prompt in found.train]


def refusal(path, **kwargs):
    with pytest.raises(DataError) as caught:
        load(path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text.replace(str(path), "train")) <= 300
    return text


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_compression_gives_the_same_prompts(tmp_path, kind, compression):
    path = write(tmp_path, RECORDS, f"train{kind}{compression}")
    assert pairs(load(path)) == [tuple(record.values()) for record in RECORDS]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_byte_order_mark_and_windows_lines(tmp_path, kind):
    plain = KINDS[kind](RECORDS)
    windows = b"\xef\xbb\xbf" + plain.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (tmp_path / f"train{kind}").write_bytes(windows)
    first, second = pairs(load(tmp_path / f"train{kind}"))
    assert first == tuple(RECORDS[0].values())
    # A line break within a cell is the cell's own.
    assert second[0].replace("\r", "") == RECORDS[1]["prompt"]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_places_name_the_line_where_a_record_begins(tmp_path, kind, compression):
    path = write(tmp_path, [*RECORDS, {"prompt": "", "completion": "x"}], f"t{kind}{compression}")
    # In the CSV file there is a header, and the second record has two lines.
    place = {".jsonl": ":3", ".csv": ":5", ".parquet": " row 3"}[kind]
    assert refusal(path).startswith(f"{path}{place}: ")


def test_empty_cells_and_blank_rows_are_nothing(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("id,prompt,completion,answer\n\n1,a,,4\n2,b,B,\n")
    found = load(path)
    assert pairs(found) == [("a", None), ("b", "B")]
    assert [prompt.answer for prompt in found.train] == ["4", None]
    assert found.unread == {"id": 2}


def test_numbers_in_cells_stay_as_they_are_written(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("question\tanswer\n007\t1.50\nNA\tnull\n")
    assert pairs(load(path)) == [("007", "1.50"), ("NA", "null")]


def test_conversations_in_cells_are_json(tmp_path):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    path = write(tmp_path, [{"messages": turns}], "train.csv")
    (prompt,) = load(path).train
    assert (prompt.messages[0].content, prompt.completion) == ("2+2?", "4")
    (tmp_path / "train.csv").write_bytes(csv_of([{"messages": str(turns)}]))
    assert "messages is text but not JSON" in refusal(path)


BROKEN_TABLES = [
    (b"prompt,completion\na,b,c\n", ":2: a row of 3 cells under a header of 2"),
    (b"prompt,completion\na\n", ":2: a row of 1 cells under a header of 2"),
    (b'prompt,completion\n"a,b\nc,d\n', ":2: a row that is not CSV (unexpected end of data)"),
    (b'prompt,completion\n"a"b,c\n', ":2: a row that is not CSV"),
    (b"prompt;completion\na;b\n", "is divided by semicolons: save the file with commas"),
    (b"prompt\tcompletion\na\tb\n", "is divided by tabs"),
    (b"prompt,prompt\na,b\n", "two columns called 'prompt'"),
    (b"prompt\nabc\n\xff\xfe\n", "not UTF-8 text"),
    ("prompt\nabc\n".encode("utf-16"), "not UTF-8 text"),
    (b"prompt,completion\n", "has no prompts: it is empty"),
    (b"", "has no prompts: it is empty"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN_TABLES)
def test_a_broken_table_is_one_line(tmp_path, content, says):
    (tmp_path / "train.csv").write_bytes(content)
    assert says in refusal(tmp_path / "train.csv")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_cut_or_mislabelled_file_is_one_line(tmp_path, kind, compression):
    path = tmp_path / f"train{kind}{compression}"
    whole = COMPRESSIONS[compression](KINDS[kind](RECORDS * 50))
    name = {".gz": "gzip", ".zst": "zstd"}[compression]
    for content in (whole[:-9], b"not compressed at all"):
        path.write_bytes(content)
        assert refusal(path).endswith(f"check that the file is whole and {name}")


def test_several_compressed_parts_in_one_file_are_all_read(tmp_path):
    for name, compress in COMPRESSIONS.items():
        path = tmp_path / f"train.jsonl{name}"
        path.write_bytes(compress(jsonl(RECORDS[:1])) + compress(jsonl(RECORDS[1:])))
        assert len(load(path).train) == 2


@pytest.mark.parametrize("name", ["train.txt", "train.zip", "train.jsonl.bz2", "train.gz"])
def test_other_kinds_are_refused_before_they_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\xff")
    assert "is none of .jsonl, .json, .csv, .tsv and .parquet" in refusal(tmp_path / name)


# ---- Folders


def shard(folder, name, *prompts):
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, [{"prompt": prompt} for prompt in prompts], name)


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path):
    shard(tmp_path / "set", "part-10.jsonl.gz", "d")
    shard(tmp_path / "set", "part-01.csv", "a", "b")
    shard(tmp_path / "set" / "part-02", "x.parquet", "c")
    (tmp_path / "set" / "LICENSE.txt").write_text("free")
    (tmp_path / "set" / ".hidden.jsonl").write_text("{oops")
    (tmp_path / "set" / "_SUCCESS").write_text("")
    found = load(tmp_path / "set")
    assert [prompt.text for prompt in found.train] == ["a", "b", "c", "d"]
    assert [prompt.place.rpartition("/")[2] for prompt in found.train] == [
        *("part-01.csv:2", "part-01.csv:3", "x.parquet row 1", "part-10.jsonl.gz:1"),
    ]
    assert found.sources[0].form == "prompts, from 3 files"


def test_a_bad_record_of_a_shard_is_named_with_its_file(tmp_path):
    shard(tmp_path / "set", "a.jsonl", "fine")
    path = shard(tmp_path / "set", "b.jsonl", "fine", " ")
    assert refusal(tmp_path / "set").startswith(f"{path}:2: prompt is empty")
    write(tmp_path / "set", [{"question": "q"}], "b.jsonl")
    assert "b.jsonl:1: the record has questions and answers" in refusal(tmp_path / "set")


def test_a_folder_with_splits_or_a_description_is_left_to_the_datasets_library(tmp_path):
    for number, names in enumerate(
        (["train-00000-of-00002.jsonl", "test.jsonl"], ["x/validation.csv"], ["a.jsonl"], [])
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            shard((folder / name).parent, (folder / name).name, "a")
        if names == ["a.jsonl"]:
            assert data_files(str(folder)) == [folder / "a.jsonl"]
            (folder / "README.md").write_text("configs: ...")
        assert data_files(str(folder)) is None


def test_data_that_is_not_read_beside_shards_is_refused(tmp_path):
    shard(tmp_path / "set", "a.jsonl", "fine")
    (tmp_path / "set" / "b.jsonl.xz").write_bytes(b"")
    assert "has b.jsonl.xz beside data files" in refusal(tmp_path / "set")


def test_a_shard_that_leads_nowhere_is_refused(tmp_path):
    shard(tmp_path / "set", "a.jsonl", "fine")
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "gone")
    assert "b.jsonl does not exist" in refusal(tmp_path / "set")


# ---- Memory


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json"])
def test_only_a_json_list_is_held_in_memory(tmp_path, kind, compression):
    """8 MB of records; what is read of them is dropped at once."""
    records = [{"prompt": f"{i} " + "x" * 1000} for i in range(8000)]
    path = tmp_path / f"train{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](KINDS[kind](records)))
    del records
    tracemalloc.start()
    try:
        assert sum(1 for _ in file_records(path)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak > 8e6) == (kind == ".json")
    assert kind == ".json" or peak < 1e6
