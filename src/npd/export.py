"""Exports the finished student to a new directory, after checking that it loads.

Promises: `out_dir` appears whole or not at all, and only after the copy has loaded and given finite
logits. The copy is the trained Hugging Face directory without conversion; only a bare LoRA adapter
is merged into its base.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import InputError, ModelError
from npd.models.files import explained, is_code_refused
from npd.models.saving import new_directory, save_pretrained
from npd.store.snapshots import MANIFEST, contents
from npd.text import first_line
from npd.types import Prompt

_TEMPLATE = "chat_template.jinja"


def export_model(student_dir: Path, out_dir: Path, *, trust_remote_code: bool = False) -> Path:
    """Copy a trained student (or the run directory that holds `student/`) to the new `out_dir`.

    A LoRA adapter (a snapshot of a run with `train.lora`) is merged into its base. Directories that
    npd published are verified against their manifest, and only listed files are copied. Python code
    in the model directory runs only with `trust_remote_code`. Returns `out_dir`.

    Raises:
        ModelError: there is no model, it does not load, or its logits are not finite.
        InputError: `out_dir` exists and is not empty, or the model needs code that is not trusted.
        StoreError: a file was altered.
    """
    from npd.models.lora import base_of

    inner = student_dir / "student"
    source = inner if inner.is_dir() else student_dir
    base = base_of(source)
    if base is None and not (source / "config.json").is_file():
        raise ModelError(
            f"no trained student in {str(student_dir)!r}: give the directory of a finished run "
            "(it holds student/), or a Hugging Face model directory"
        )
    code = _code_explained(Path(base or source))
    with code, new_directory(out_dir) as folder:
        if base is None:
            _copy(source, folder)
        else:
            _merge(source, base, folder, trust_remote_code)
        _check(folder, source, trust_remote_code)
    return out_dir


@contextmanager
def _code_explained(folder: Path) -> Iterator[None]:
    """Explain a loading error that comes from Python code that is not trusted."""
    try:
        yield
    except ModelError as error:
        if not is_code_refused(error):
            raise
        raise InputError(
            f"the model in {str(folder)!r} cannot be loaded without Python code of its own: read "
            "the code, and if you trust it add --trust-remote-code to npd export (in Python: "
            "trust_remote_code=True)"
        ) from error


def _copy(source: Path, folder: Path) -> None:
    """Copy the files in the manifest, verified; without a manifest, the whole directory."""
    if not (source / MANIFEST).exists():
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return
    for name in (*contents(source), MANIFEST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _merge(adapter: Path, base: str, folder: Path, trust_remote_code: bool) -> None:
    from safetensors import SafetensorError

    from npd.models.loading import load_model

    try:
        model = load_model(
            adapter,
            role="adapter",
            dtype="bfloat16",
            packed=False,
            trust_remote_code=trust_remote_code,
        )
    except SafetensorError as error:
        raise ModelError(
            f"the adapter in {str(adapter)!r} cannot be read ({first_line(error)}), so it is "
            "damaged: export another snapshot, or resume the run to rewrite it"
        ) from error
    save_pretrained(model, folder, source=base, dtype="bfloat16")
    if (adapter / _TEMPLATE).is_file():  # of `data.chat_template`, in place of the base's
        shutil.copyfile(adapter / _TEMPLATE, folder / _TEMPLATE)


def _check(folder: Path, source: Path, trust_remote_code: bool) -> None:
    import torch

    from npd.models.loading import load_model

    # With a manifest, `_copy` has verified the files, so rewriting them would not help.
    remedy = (
        "its files are unchanged, so this environment lacks something that the run had: compare "
        "npd version with the versions in the run's config.json"
        if (source / MANIFEST).exists()
        else "complete the directory, or copy or save the model again"
    )
    what = f"the model in {str(source)!r} does not load again"
    with explained(what, remedy, with_ours=True):
        model = load_model(folder, packed=False, trust_remote_code=trust_remote_code)
        chat = ChatTokenizer.load(folder, trust_remote_code=trust_remote_code)
        if chat.has_template:
            chat.encode(Prompt(index=0, text="What is two plus two?"))
        ids = torch.arange(8) % model.config.get_text_config().vocab_size
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the model in {str(source)!r} gives non-finite logits, so it diverged or is damaged: "
            "export an earlier snapshot, or train again with a lower train.lr"
        )
