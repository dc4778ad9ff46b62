"""The finished student as a directory of its own, checked to work before it is handed over.

Promises: `out_dir` appears whole or not at all, and only after the copy has loaded and given finite
logits. Does not convert: the copy is the Hugging Face directory as it was trained. Only a LoRA
adapter by itself is merged into its base.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from npd.errors import ModelError
from npd.prepare import first_line, new_directory


def export_model(student_dir: Path, out_dir: Path, *, trust_remote_code: bool = False) -> Path:
    """Copy a trained student (or the run directory that holds `student/`) to the new `out_dir`.

    A LoRA adapter (a snapshot of a run with `train.lora`) becomes the model it makes of its base.
    Returns `out_dir`.

    Raises:
        ModelError: no model there, or it does not load, or its logits are not finite.
        InputError: `out_dir` exists and is not empty.
    """
    from npd.lora import base_of

    inner = student_dir / "student"
    source = inner if inner.is_dir() else student_dir
    base = base_of(source)
    if base is None and not (source / "config.json").is_file():
        raise ModelError(
            f"no trained student in {str(student_dir)!r}: give the directory of a finished run "
            "(it holds student/), or a Hugging Face model directory"
        )
    with new_directory(out_dir) as folder:
        if base is None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        else:
            _merge(source, base, folder, trust_remote_code)
        _check(folder, source, trust_remote_code)
    return out_dir


def _merge(adapter: Path, base: str, folder: Path, trust_remote_code: bool) -> None:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from npd.modeling import load_model, quiet

    try:
        model = load_model(
            adapter, dtype="bfloat16", packed=False, trust_remote_code=trust_remote_code
        )
    except SafetensorError as error:
        raise ModelError(
            f"the adapter in {str(adapter)!r} cannot be read ({first_line(error)}): it is damaged; "
            "export another snapshot, or resume the run to write it anew"
        ) from error
    with quiet():
        model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(folder)


def _check(folder: Path, source: Path, trust_remote_code: bool) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from npd.modeling import load_model

    try:
        model = load_model(folder, packed=False, trust_remote_code=trust_remote_code)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, SafetensorError, ModelError) as error:
        raise ModelError(
            f"the model in {str(source)!r} does not load again ({first_line(error)}): it is "
            "incomplete or damaged; resume the run to write it anew"
        ) from error
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(8)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the model in {str(source)!r} gives non-finite logits: it diverged or is damaged; "
            "export an earlier snapshot, or train again with a lower train.lr"
        )
