"""The files on docs/data.md are read, and the model sees what the page says."""

import re
from pathlib import Path

import pytest

from npd.config import DataConfig, RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.forms import FORMS
from npd.data.inputs import read_data
from npd.data.prompts import load_prompts
from tiny_model import make_model, make_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    """Each data file of the page with the text that follows it, and the template before it."""
    found, files, template = [], [], None
    for kind, name, content in BLOCK.findall(PAGE):
        if kind == "jinja":
            template = content.removesuffix("\n")
        elif kind == "text":
            found += [(file, data, template, content.removesuffix("\n")) for file, data in files]
            files = []
        elif name:
            files.append((name, content))
    assert not files, "a file without its text"
    return found


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "template", "text"), blocks(), ids=[name for name, *_ in blocks()]
)
def test_the_model_sees_what_the_page_says(tmp_path, student, name, content, template, text):
    path = tmp_path / name
    path.write_text(content)
    config = RunConfig(
        student=str(student),
        generate={"source": "dataset"},
        loss={"kd_weight": 0.0},
        filter={"name": "none"},
        eval={"source": "none"},
        schedule={"refresh": "never"},
        data={"train": str(path), "chat_template": template},
    )
    (prompt,) = read_data(config, chat := ChatTokenizer.of_student(config)).prompts
    seen, trained = (chat.tokenizer.decode(i) for i in (prompt.prompt_ids, prompt.completion_ids))
    assert f"{seen}▶{trained}" == text


def test_the_page_has_a_file_of_every_form(tmp_path):
    forms = set()
    for name, content, *_ in blocks():
        (tmp_path / name).write_text(content)
        config = DataConfig(train=str(tmp_path / name), heldout_size=0)
        forms.add(load_prompts(config).sources[0].form)
    assert forms == {form.title for form in FORMS.values()}
