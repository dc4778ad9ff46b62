"""Mixers of packed rows: no state crosses a boundary, and what could let it cross is refused."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.config.sections import LoraConfig
from npd.errors import ModelError
from npd.models import lora
from npd.models.loading import check_packable, hidden_states, load_model, pack_documents
from npd.models.packed_attention import Boundaries, Shared, row_boundaries, row_of, same_row
from npd.models.packed_mixers import (
    _batches,
    _by_document,
    _layout,
    mixers_of,
    own_class,
    pack_mixers,
    unpacked_mixers,
)
from npd.train.fsdp import layers_of
from test_architectures import HYBRID, MORE_HYBRID, TAKEN, random_ids, saved

FAMILIES = HYBRID | MORE_HYBRID


@pytest.fixture(scope="module")
def lfm2_dir(tmp_path_factory):
    return saved("Lfm2", FAMILIES["Lfm2"], tmp_path_factory.mktemp("lfm2"))


@pytest.fixture
def lfm2(lfm2_dir):
    return load_model(lfm2_dir)


def built(family):
    import transformers

    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**(FAMILIES | TAKEN)[family]))


class Recording:
    """A causal mixer that remembers what it was given; its state is the running sum."""

    def __init__(self):
        self.shapes = []

    def __call__(self, hidden_states, position_ids, scale):
        self.shapes.append(tuple(hidden_states.shape))
        assert position_ids.shape == hidden_states.shape[:2]
        assert (position_ids[:, 0] == 0).all()
        sums = hidden_states.cumsum(dim=1) * scale
        return sums, sums[:, -1], None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 3]))
@settings(max_examples=100)
def test_each_document_has_its_own_state(lengths, most_padded):
    """In batches of any documents, of which at most a known part is padding."""
    mixer = Recording()
    bounds = (0, *np.cumsum(lengths).tolist())
    row = torch.randn(1, bounds[-1], 50, dtype=torch.float64, requires_grad=True)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    layout = _layout(Boundaries(bounds), "cpu", most_padded)
    options = {"position_ids": positions, "scale": 2.0}
    out, state, nothing = _by_document(mixer, layout, (row,), options)
    alone = torch.cat([2 * row[:, i:j].cumsum(dim=1) for i, j in pairwise(bounds)], dim=1)
    torch.testing.assert_close(out, alone)
    assert state is None
    assert nothing is None
    weights = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weights).sum(), row)
    (expected,) = torch.autograd.grad((alone * weights).sum(), row)
    torch.testing.assert_close(found, expected)
    assert sum(n * longest for n, longest, _ in mixer.shapes) <= most_padded * sum(lengths)
    if most_padded > 1:
        assert len(mixer.shapes) <= 1 + math.log(max(lengths) / min(lengths), most_padded)


@pytest.mark.parametrize("most_padded", [1, 2])
def test_documents_that_share_tokens_are_mixed_whole(most_padded):
    """Two documents of five tokens share their first three, as scored samples of one prompt do."""
    take, keep = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 6]), torch.tensor([0, 1, 2, 3, 4, 8, 9])
    row = torch.arange(1.0, 8.0).reshape(1, 7, 1)
    layout = _layout(Boundaries((0, 5, 10), Shared(take, keep)), "cpu", most_padded)
    out = _by_document(lambda x: x.cumsum(dim=1), layout, (row,), {})
    assert out.flatten().tolist() == [1, 3, 6, 10, 15, 12, 19]


def test_documents_of_similar_length_are_one_batch():
    assert _batches((0, 3, 4, 7, 9), 2) == [[(0, 3), (4, 7), (7, 9)], [(3, 4)]]
    assert _batches((0, 3, 4), 1) == [[(0, 3)], [(3, 4)]]


def test_a_row_without_boundaries_raises(lfm2):
    batch = pack_documents([random_ids(4, 1), random_ids(3, 2)], "cpu")
    mixer = mixers_of(lfm2)[0]
    states = torch.zeros(1, 7, lfm2.config.hidden_size)
    with pytest.raises(AssertionError, match="without document boundaries"):
        mixer(states)
    with pytest.raises(AssertionError, match="without document boundaries"):
        lfm2(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    with unpacked_mixers():
        assert mixer(states).shape == states.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Lfm2", "Mamba", "Qwen3Next", "FalconH1"])
def test_a_mixer_that_is_not_packed_is_refused(family, dtype, tmp_path):
    model = load_model(saved(family, FAMILIES[family], tmp_path), dtype=dtype)
    check_packable(model)
    for mixer in mixers_of(model):
        mixer.__class__ = own_class(mixer)
    with pytest.raises(ModelError, match=r"(mixes the documents|custom attention code)"):
        check_packable(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixers_are_found_once(family):
    """They are parts of layers, and no layer is one, even of a class whose others hold none."""
    model = built(family)
    found = mixers_of(model)
    assert found
    layers = {type(layer) for layer in layers_of(model) if type(layer).__name__[-5:] != "Mixer"}
    assert not any(isinstance(mixer, tuple(layers)) for mixer in found)
    names = [type(mixer).__name__ for mixer in found]
    pack_mixers(model)
    assert mixers_of(model) == found
    assert [type(mixer).__name__ for mixer in found] == names


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Llama4Text", "GPT2"])
def test_attention_is_no_mixer(family):
    assert mixers_of(built(family)) == []


def test_a_copy_of_a_packed_model_is_packed(lfm2):
    row = pack_documents([random_ids(4, 1), random_ids(9, 2)], "cpu")
    with torch.no_grad():
        expected = hidden_states(lfm2, row)
        assert torch.equal(hidden_states(copy.deepcopy(lfm2), row), expected)


def test_a_recomputation_has_the_row_of_its_forward_pass():
    with row_of(Boundaries((0, 2, 5))):
        forward, again = same_row()
    assert row_boundaries() is None
    with again:
        assert row_boundaries().cu_seqlens == (0, 2, 5)
    with forward:
        assert row_boundaries() is None


@pytest.mark.parametrize("family", ["Mamba", "FalconH1", "Bamba", "Zamba2", "Lfm2", "NemotronH"])
def test_adapters_are_on_layers_that_are_called(family):
    """Kernels take some weights from their layers, past an adapter; peft refuses some of those."""
    pytest.importorskip("peft")
    model = built(family)
    pack_mixers(model)
    config = LoraConfig(rank=2)
    covered = lora.coverage(model, config, "base")
    lora.attach(model, config, base="base", seed=0, dtype="float32")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == covered.layers
    assert any(name.endswith("out_proj") for name in adapted) == (family == "Lfm2")
    with row_of(Boundaries((0, 4, 7))):
        ids = torch.arange(7)[None]
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        model.train()(
            input_ids=ids, position_ids=positions, use_cache=False
        ).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name
