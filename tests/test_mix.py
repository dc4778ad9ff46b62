"""Several sources: proportions, held-out prompts of each, counts, and the same draw every time."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import write
from npd.config import DataConfig, RunConfig
from npd.data.mixture import apportioned, mixed_size
from npd.data.prompts import load_prompts
from npd.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path):
    """Writes a file of prompts `name 0`, `name 1`, ...; returns its path."""

    def make(name, count):
        return write(tmp_path, [{"prompt": f"{name} {i}"} for i in range(count)], f"{name}.jsonl")

    return make


def load(mix, seed=0, **data):
    return load_prompts(DataConfig(mix=mix, **data), seed)


def counts(prompts):
    return dict(Counter(prompt.text.split()[0] for prompt in prompts))


def test_without_weights_every_prompt_is_used(source):
    found = load({"a": source("a", 30), "b": source("b", 10)}, heldout_size=0)
    assert counts(found.train) == {"a": 30, "b": 10}
    assert [prompt.index for prompt in found.train] == list(range(40))
    mix = {"a": source("a", 30), "b": source("b", 10)}
    assert counts(load(mix, heldout_size=4, limit=8).train) == {"a": 6, "b": 2}


def test_weights_are_proportions_as_large_as_the_sources_allow(source):
    mix = {
        "a": {"train": source("a", 100), "weight": 0.7},
        "b": {"train": source("b", 30), "weight": 0.3},
    }
    assert counts(load(mix, heldout_size=0).train) == {"a": 70, "b": 30}
    assert counts(load(mix, heldout_size=0, limit=10).train) == {"a": 7, "b": 3}
    found = load(mix, heldout_size=10)
    assert counts(found.heldout) == {"a": 7, "b": 3}
    assert counts(found.train) == {"a": 63, "b": 27}
    assert [(s.name, s.num_train, s.num_heldout, s.num_read) for s in found.sources] == [
        ("a", 63, 7, 100),
        ("b", 27, 3, 30),
    ]


def test_the_draw_follows_the_seed_and_keeps_the_order_of_the_files(source):
    mix = {
        "a": {"train": source("a", 60), "weight": 1},
        "b": {"train": source("b", 20), "weight": 1},
    }
    once, again, other = (load(mix, seed, heldout_size=8) for seed in (0, 0, 1))
    assert once == again
    assert [p.text for p in once.train] != [p.text for p in other.train]
    drawn = [int(p.text.split()[1]) for p in once.train if p.text.startswith("a")]
    assert drawn == sorted(drawn) != list(range(len(drawn)))


def test_the_default_held_out_size_counts_what_is_used(source):
    mix = {
        "a": {"train": source("a", 500), "weight": 1},
        "b": {"train": source("b", 20), "weight": 1},
    }
    assert counts(load(mix).heldout) == {"a": 2, "b": 2}


def test_sources_may_have_forms_and_columns_of_their_own(source, tmp_path):
    talk = write(tmp_path, [{"conversations": [{"from": "human", "value": "c 0"}]}], "c.jsonl")
    body = write(tmp_path, [{"body": "d 0", "prompt": "no"}], "d.jsonl")
    mix = {"a": source("a", 1), "c": talk, "d": {"train": body, "columns": {"prompt": "body"}}}
    found = load(mix, heldout_size=0)
    assert [p.text or p.messages[0].content for p in found.train] == ["a 0", "c 0", "d 0"]
    assert [s.form for s in found.sources] == [
        "prompts",
        "ShareGPT conversations",
        "prompts (`body`, by data.mix.d.columns)",
    ]
    both = write(tmp_path, [{"prompt": "p", "question": "q"}], "both.jsonl")
    with pytest.raises(DataError, match=r"--set data\.mix\.e\.format=question"):
        load({"e": both}, heldout_size=0)
    chosen = load({"e": {"train": both, "format": "question"}}, heldout_size=0)
    assert chosen.train[0].text == "q"


def test_a_prompt_held_out_of_one_source_is_not_trained_on_from_another(source, tmp_path):
    same = write(tmp_path, [{"prompt": f"a {i}"} for i in range(20)], "same.jsonl")
    found = load({"a": source("a", 20), "same": same}, heldout_size=6)
    asked = {p.text for p in found.heldout}
    assert not asked & {p.text for p in found.train}
    assert found.dropped["in_heldout"] > 0


def test_too_few_prompts_of_one_source_are_named(source):
    mix = {"a": source("a", 50), "b": source("b", 1)}
    with pytest.raises(DataError, match=r"b\.jsonl has 1 prompt, too few .* its part of 40"):
        load({name: {"train": path, "weight": 1} for name, path in mix.items()}, heldout_size=40)
    found = load(mix, heldout=source("h", 3))
    assert (counts(found.heldout), counts(found.train)) == ({"h": 3}, {"a": 50, "b": 1})


def test_a_mix_is_checked_before_anything_is_read():
    base = {"student": "s", "teacher": "t"}
    with pytest.raises(ConfigError, match=r"data\.mix\.b has no weight"):
        RunConfig(**base, data={"mix": {"a": {"train": "x", "weight": 1}, "b": "y"}})
    with pytest.raises(ConfigError, match=r"--set data\.train=null"):
        RunConfig(**base, data={"train": "z", "mix": {"a": "x"}})


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.7, 1.0, 2.5, 33.0])),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0, 1),
)
def test_proportions_hold_to_one_prompt_and_take_no_more_than_there_is(sources, share):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    most = mixed_size(sizes, weights)
    for total in (most, int(share * most)):
        taken = apportioned(total, weights)
        assert sum(taken) == total
        for count, size, weight in zip(taken, sizes, weights, strict=True):
            assert count <= size
            assert abs(count - total * weight / sum(weights)) < 1
    assert any(
        size < (most + 1) * weight / sum(weights)
        for size, weight in zip(sizes, weights, strict=True)
    ), "one prompt more would be in no source"
