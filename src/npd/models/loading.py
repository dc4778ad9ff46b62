"""Loads causal language models for packed rows, without a cache and with a separate LM head.

Promises, checked at load: no weight is missing or initialised at random. The hidden states of a
document in a packed row equal those of the document alone under the architecture's own attention;
architectures that mix documents are refused. `head(hidden)` equals the model's own logits. The
attention function raises if a row's boundaries are missing. Does not score, sample or train.

Dimensions: T tokens of a packed row, d hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from npd.errors import ModelError
from npd.models import lora
from npd.models.device import is_gpu, on_device
from npd.models.distributed import DistContext
from npd.models.files import code_refusal, explained, in_one_line, is_code_refused
from npd.models.lm_head import head_of
from npd.models.metadata import context_of
from npd.models.packed_attention import (
    ATTENTION,
    WINDOWED,
    Boundaries,
    Shared,
    UnsupportedAttentionError,
    check_rotation,
    registered_attention,
    row_of,
    window_of,
)
from npd.models.packed_mixers import pack_mixers, unpacked_mixers
from npd.models.tensors import REPORTING, about, check_conversion, check_headers, check_loaded
from npd.types import IntArray

_LOADING = Lock()  # one thread at a time: transformers sets the default device globally
# The largest relative difference of a document's states at another position, or beside another
# text, in a row of the same shape. Measured: 0 for attention-only models (24 layers, mixture of
# experts), 0.3 to 1.3 for models that mix. The tolerance allows for another order of rounding, and
# still detects an untrained mixer (3e-4) in float32.
_PLACE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# The same against the document alone, where shapes and kernels differ too; the median over its
# tokens, because in bfloat16 a near tie can send a token to another expert.
_ALONE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
_ALONE = DistContext()
_CHOOSE = (
    "choose another model (Llama, Qwen, Mistral, Gemma 3 and most decoders work); a teacher can "
    "also run on a server (score.engine: vllm)"
)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed row: `input_ids`, `position_ids` [1, T]; `cu_seqlens` (0, ..., T) its documents.

    Example: documents [5, 6] and [7] give input_ids [[5, 6, 7]], position_ids [[0, 1, 0]] and
    cu_seqlens (0, 2, 3). If documents share tokens, `shared` says which, and `cu_seqlens` are those
    of the full documents, each with its own copy of shared tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]
    shared: Shared | None = None


def pack_documents(documents: Sequence[IntArray], device: str | torch.device) -> PackedBatch:
    """Lay `documents` end to end in one row, positions restarting at each."""
    lengths = [len(document) for document in documents]
    assert lengths, "a row needs at least one document"
    assert min(lengths) > 0, "an empty document cannot be packed"
    ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = (0, *accumulate(lengths))
    return PackedBatch(on_device(ids[None], device), on_device(positions[None], device), bounds)


def autocast(device: torch.device, *, is_on: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or autocast off; a no-op on a device without autocast."""
    if not (is_on or torch.amp.is_autocast_available(device.type)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def load_model(
    path: str | Path,
    *,
    role: str = "model",
    dtype: str = "float32",
    device: str = "cpu",
    packed: bool = True,
    trust_remote_code: bool = False,
    dist: DistContext = _ALONE,
    compute_dtype: str | None = None,
) -> Any:
    """A causal LM from a Hugging Face directory or name, in eval mode.

    The directory of a LoRA adapter gives its base with the adapter merged. `packed=True` sets the
    packed attention (no cache) and checks the architecture; False keeps SDPA for decoding, where a
    model need not be packable. `compute_dtype` is autocast's, where the model will run under it: a
    GPU's kernels depend on it. `role` is the model's role in the run, for messages. Threads load
    one after the other. In a `dist` of several ranks each gets its part of every layer, or all
    fail.

    Raises:
        ModelError: the directory cannot be loaded (on some rank), weights are missing or not
            finite, documents in a packed row influence each other (ALiBi models, custom attention
            code), or the logits differ from those of the head.
    """
    if dist.size > 1:
        # Loading weights is collective: check on all ranks first that the model is there.
        dist.all_or_raise(lambda: read_config(path, trust_remote_code=trust_remote_code))

    def load() -> Any:
        with about(role, path):
            model = _loaded(path, role, dtype, packed, trust_remote_code, dist.size)
            return model.to(device).eval()

    model = dist.all_or_raise(load)
    if packed:
        with about(role, path):
            is_on_gpu = is_gpu(str(model.device))
            check_packable(model, compute_dtype=compute_dtype if is_on_gpu else None)
    return model


def _loaded(path: str | Path, role: str, dtype: str, packed: bool, trust: bool, ranks: int) -> Any:
    base = lora.base_of(path)
    source = str(base or path)
    # Only newer releases know this option, so it is passed only when needed.
    spread: dict[str, Any] = {} if ranks == 1 else {"distributed_config": {"tp_size": ranks}}
    # With one rank it may be a snapshot, whose damage the caller reports.
    damaged = () if ranks == 1 else (SafetensorError,)
    config = read_config(path, trust_remote_code=trust, role=role)
    attention = register_attention(config) if packed else own_attention(config)
    # Set on the config, because a config.json that names another one takes precedence.
    config._attn_implementation = attention
    config.output_attentions, config.return_dict = False, True
    try:
        with about("base", base) if base else nullcontext():
            model = load_whole(
                source,
                config=config,
                dtype=getattr(torch, "float32" if base else dtype),
                attn_implementation=attention,
                trust_remote_code=trust,
                **spread,
            )
    except (OSError, ValueError, KeyError, *damaged) as error:
        if packed and str(attention) in str(error):
            raise unreplaceable(config) from error
        raise ModelError(
            f"cannot load a causal language model from {source!r}: {in_one_line(error)}. "
            "Give a Hugging Face model directory with safetensors weights"
        ) from error
    _check_attention(model, attention)
    if packed:
        pack_mixers(model)
    return model if base is None else lora.merge(model, Path(path), dtype)


def load_whole(source: str | Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, refused if a weight was initialised at random.

    Raises:
        ModelError: weights are missing, have another shape, or belong to no module.
        OSError, ValueError, KeyError, SafetensorError: other errors of transformers.
    """
    from transformers import AutoModelForCausalLM

    try:
        with loading():
            model, found = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, **options, **REPORTING
            )
    except RuntimeError as error:
        check_conversion(error, source)
        raise
    check_loaded(model, found)
    return model


def register_attention(config: Any) -> str:
    """Register the packed attention with transformers; returns the name for a model of `config`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (ATTENTION, WINDOWED):
        AttentionInterface.register(name, registered_attention())
    AttentionMaskInterface.register(WINDOWED, window_of)
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    # Not for all models: to build masks, transformers looks for packed rows and blocks the host.
    return WINDOWED if any(sizes) else ATTENTION


def own_attention(config: Any) -> str | None:
    """The attention for decoding: None for SDPA if the architecture has it, or "eager".

    Eager is needed for capped scores, because SDPA in transformers ignores the cap.
    """
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if is_capped else None


def _check_attention(model: Any, requested: str | None) -> None:
    """Check that each part of the model runs the requested attention."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = {getattr(config, "_attn_implementation", requested) for config in configs if config}
    wrong = found - ({requested} if requested else {"sdpa", "eager"})
    if wrong:
        raise _refusal(model, f"always runs {', '.join(map(str, wrong))} attention")


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Final hidden states [T, d] of a packed row: the input of the LM head."""
    with row_of(Boundaries(batch.cu_seqlens, batch.shared)):
        out = _backbone(model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
    hidden = out.last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden[0]


@contextmanager
def loading() -> Iterator[None]:
    """Build a model with transformers within the block: one thread at a time, without output."""
    # The lock comes first: silencing is global and must be nested correctly.
    with _LOADING, quiet():
        yield


def unreplaceable(config: Any) -> ModelError:
    """The error for an architecture with its own list of attention functions."""
    return ModelError(
        f"this architecture ({config.model_type}) has custom attention code, which cannot be "
        f"replaced: {_CHOOSE}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers within the block.

    They break the live view, and npd reports the same problems itself.
    """
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def decoding(model: Any) -> Iterator[Any]:
    """Let a packed model decode with a cache within the block."""
    was_training = model.training
    model.eval()
    try:
        with _with_attention(model, own_attention(model.config)):
            yield model
    finally:
        model.train(was_training)


@contextmanager
def own_code(model: Any) -> Iterator[None]:
    """Use the architecture's own attention code within the block."""
    with _with_attention(model, "eager"):
        yield


@contextmanager
def _with_attention(model: Any, name: str | None) -> Iterator[None]:
    """Use another attention within the block; None: SDPA if the architecture has it."""
    before = model.config._attn_implementation
    with quiet():
        try:
            model.set_attn_implementation(name or "sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
    try:
        with unpacked_mixers():
            yield
    finally:
        with quiet():
            model.set_attn_implementation(before)


def read_config(path: str | Path, *, trust_remote_code: bool = False, role: str = "model") -> Any:
    """A model's config; for an adapter, its base's. Reads no weights.

    Raises:
        ModelError: there is no usable config, or it needs code that is not trusted.
    """
    from transformers import AutoConfig

    model = str(lora.base_of(path) or path)
    remedy = (
        "give a Hugging Face model directory or the name of a model on this machine, or copy or "
        "save it again"
    )
    what = f"the {role} {path} has no usable config.json"
    if not Path(model).exists():
        what = f"the {role} {path} is not a directory here, and not on the Hugging Face hub"
        remedy = "correct the path or name"
    with explained(what, remedy):
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if is_code_refused(error):
                raise code_refusal(role, model, "config.json") from error
            raise
    if not trust_remote_code and _is_code_of_its_own(config):
        raise code_refusal(role, model, "config.json")
    return config


def _is_code_of_its_own(config: Any) -> bool:
    """Whether the model's code is in its directory, and transformers only knows its config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return not is_known and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def outline(path: str | Path, *, trust_remote_code: bool = False, is_packed: bool = False) -> Any:
    """The model of a directory or name on the meta device, from its config alone.

    `is_packed` sets the packed attention, as `load_model` does.

    Raises:
        ModelError: there is no config, or the model cannot be built on the meta device.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(path, trust_remote_code=trust_remote_code)
    # Shapes do not depend on it, and the one in config.json may not be installed.
    config._attn_implementation = register_attention(config) if is_packed else "eager"
    config.output_attentions, config.return_dict = False, True
    make = AutoModelForCausalLM.from_config
    what = f"no model can be built from the config.json of {path}"
    with explained(what, "copy or save the model again"), _LOADING, torch.device("meta"):
        model = make(config, trust_remote_code=trust_remote_code)
    # It may be given weights and trained.
    pack_mixers(model)
    return model


def supports_tensor_parallel() -> bool:
    """Whether this transformers can load a model split over ranks (5.17 or newer)."""
    import transformers

    return getattr(transformers, "DistributedConfig", None) is not None


def check_context(
    path: str | Path,
    longest: int,
    *,
    trust_remote_code: bool = False,
    limit: str = "generate.max_new_tokens",
) -> None:
    """Raise ModelError if the model's context is shorter than `longest` tokens.

    `limit` is the setting that bounds a response. Reads the config only, no weights.
    """
    config = read_config(path, trust_remote_code=trust_remote_code).get_text_config()
    context = context_of(config)
    if context is not None and context < longest:
        raise ModelError(
            f"a sample may have {longest} tokens (data.max_prompt_tokens + "
            f"{limit}) but the model's context is {context}: lower them to {context} in sum"
        )
    check_rotation(config, longest)


def check_weights(path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Check the names and shapes of a directory's weights, reading their headers only.

    Raises:
        ModelError: weights are missing, damaged, misnamed or of another shape.
    """
    directory = Path(lora.base_of(path) or path)
    if directory.is_dir():  # a model from a hub is checked when it is loaded
        config = read_config(path, trust_remote_code=trust_remote_code)
        with loading():
            check_headers(directory, config, partial(_architecture, trust=trust_remote_code))


def _architecture(config: Any, *, trust: bool) -> Any | None:
    """The class of a config's causal language model; None if building it takes memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            return None
        raise ModelError(
            f"its config.json describes a {config.model_type} model, for which transformers has no "
            "causal language model: choose one that generates text"
        ) from error
    except (KeyError, ArithmeticError) as error:
        raise ModelError(
            f"no model can be built from its config.json ({error!r}): copy or save the model again"
        ) from error
    except (RuntimeError, TypeError, AttributeError, LookupError, OSError, ImportError):
        return None
    return type(model)


def check_packable(model: Any, *, compute_dtype: str | None = None) -> None:
    """Check on a few tokens that a loaded packed model computes what its architecture computes.

    With `compute_dtype` bfloat16 also under autocast.

    Raises:
        ModelError: documents in a row influence each other, or the head differs.
    """
    try:
        with torch.no_grad():
            _check_documents(model)
            _check_head(model)
            if compute_dtype == "bfloat16" and model.dtype == torch.float32:
                with autocast(model.device, is_on=True):
                    _check_documents(model)
    except UnsupportedAttentionError as error:
        raise _refusal(model, str(error)) from error
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = str(e) if isinstance(e, AssertionError) else repr(e)
        raise _refusal(model, f"cannot take a packed row ({reason:.200})") from e


def _check_documents(model: Any) -> None:
    """Check that each document has the states it has alone, behind another one and with sharing.

    Some trained weights make rounding in a narrow type as large as mixing. So what fails there is
    checked once more in float32, with the narrower bounds of that, by a copy of the model.
    """
    try:
        _compare_documents(model)
    except ModelError:
        if model.dtype == torch.float32:
            raise
        _compare_documents(copy.deepcopy(model).float())


def _compare_documents(model: Any) -> None:
    """The comparison of `_check_documents`, in the model's own type.

    Swapping two of equal length keeps all shapes, so even bfloat16 rounds nearly the same.
    """
    a, b = _two_documents(model)
    c = np.concatenate([a[:3], b[:2]])
    row = pack_documents([a, b], model.device)
    forth = hidden_states(model, row)
    _check_states(model, forth)
    back = hidden_states(model, pack_documents([b, a], model.device)).roll(len(a), dims=0)
    beside = hidden_states(model, pack_documents([c, b], model.device))
    alone = _alone(model, np.stack([a, b, c]))
    together = hidden_states(model, _shared_row(a, c, model.device))
    is_exact = back.dtype == torch.float32 and not _is_autocast(model.device.type)
    dtype = torch.float32 if is_exact else torch.bfloat16
    tight, wide = _PLACE_TOLERANCE[dtype], _ALONE_TOLERANCE[dtype]
    if _farthest(forth, back) > tight or _farthest(forth[5:], beside[5:]) > tight:
        raise _refusal(model, _why_mixed(model, row, forth))
    if _farthest(forth[:3], beside[:3]) > tight:
        raise _refusal(model, "lets a token attend to later tokens")
    typical = _farthest_token if is_exact else _median_token
    if max(typical(forth[:5], alone[0]), typical(forth[5:], alone[1])) > wide:
        raise _refusal(model, _why_mixed(model, row, forth))
    if max(typical(together[:5], alone[0]), typical(together[5:], alone[2][3:])) > wide:
        raise _refusal(model, "gives other results if documents share a prefix")


def _is_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _alone(model: Any, documents: IntArray) -> Tensor:
    """States [n, L, d] of documents of one length under the architecture's own attention."""
    ids = torch.from_numpy(documents.astype(np.int64)).to(model.device)
    position_ids = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
    with own_code(model):
        out = _backbone(model)(input_ids=ids, position_ids=position_ids, use_cache=False)
    states = out.last_hidden_state
    assert isinstance(states, Tensor)
    return states


def _shared_row(first: IntArray, second: IntArray, device: torch.device) -> PackedBatch:
    """A row of two documents of five tokens, whose first three tokens are shared."""
    ids = torch.from_numpy(np.concatenate([first, second[3:]]).astype(np.int64))
    position_ids = torch.tensor([0, 1, 2, 3, 4, 3, 4])
    take = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 6])
    keep = torch.tensor([0, 1, 2, 3, 4, 8, 9])
    shared = Shared(take.to(device), keep.to(device))
    return PackedBatch(ids[None].to(device), position_ids[None].to(device), (0, 5, 10), shared)


def check_finite(model: Any) -> None:
    """Check that every weight of a model is finite; takes as long as reading them.

    Raises:
        ModelError: a weight is not finite.
    """
    # torch cannot test FP8 and integers.
    floats = ((name, tensor) for name, tensor in model.named_parameters() if tensor.itemsize > 1)
    worst = next((name for name, tensor in floats if not tensor.isfinite().all()), None)
    if worst is not None:
        raise ModelError(f"its weights are not finite ({worst}): copy or save the model again")


def _check_states(model: Any, states: Tensor) -> None:
    if not states.isfinite().all():
        check_finite(model)
        raise _refusal(model, f"overflows in {states.dtype}: choose another dtype")


def _why_mixed(model: Any, row: PackedBatch, states: Tensor) -> str:
    """The cause of mixed documents: the attention, or something else."""
    one = PackedBatch(row.input_ids, row.position_ids, (0, row.cu_seqlens[-1]))
    if torch.equal(hidden_states(model, one), states):
        return "uses custom attention code instead of the registered attention"
    return "mixes the documents of a packed row (by recurrence, convolution, or a position bias)"


def _farthest(states: Tensor, expected: Tensor) -> float:
    apart = _relative(states, expected, expected.float().norm(dim=-1).mean())
    return float(apart.max())


def _farthest_token(states: Tensor, expected: Tensor) -> float:
    return float(_relative(states, expected, expected.float().norm(dim=-1)).max())


def _median_token(states: Tensor, expected: Tensor) -> float:
    return float(_relative(states, expected, expected.float().norm(dim=-1)).median())


def _relative(states: Tensor, expected: Tensor, size: Tensor) -> Tensor:
    """The relative distance of each state from the expected one; infinite if one is not finite."""
    apart: Tensor = (states - expected).float().norm(dim=-1) / size.clamp(min=1e-30)
    return apart.nan_to_num(nan=torch.inf)


def _check_head(model: Any) -> None:
    row = pack_documents(_two_documents(model), model.device)
    with row_of(Boundaries(row.cu_seqlens)):
        out = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
    expected = out.logits[0]
    got = head_of(model).logits(hidden_states(model, row))
    # bf16 keeps 8 bits: logits of size x agree to about x / 100 whatever the order of operations.
    scale = expected.float().abs().max().item()
    if not torch.allclose(got, expected.float(), atol=0.02 * scale + 1e-5, rtol=0.0):
        raise ModelError(
            f"this architecture ({type(model).__name__}) does not compute its logits as "
            "head(hidden) with scale and softcap: please open an issue"
        )


def _two_documents(model: Any) -> tuple[IntArray, IntArray]:
    ids = np.arange(10, dtype=np.int32) % model.config.get_text_config().vocab_size
    return ids[:5], ids[5:]


def _backbone(model: Any) -> Any:
    found = getattr(model, model.base_model_prefix, None)
    # Llama 4's prefix names a module that only its larger model has.
    return getattr(model, "model", None) if found is None else found


def _refusal(model: Any, what: str) -> ModelError:
    return ModelError(f"this architecture ({type(model).__name__}) {what}: {_CHOOSE}")
