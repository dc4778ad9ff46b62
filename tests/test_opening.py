"""The record of a run: what it keeps of the config, and that a run goes on from it."""

from __future__ import annotations

import pytest

from npd.control.opening import load_run, open_directory
from npd.control.preparation import Prepared
from npd.errors import ConfigError
from tiny_run import tiny_config


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """Configs of one run, whose teacher's server is started with an environment."""

    def build(**environment):
        launch = {"command": ["serve"], "env": environment}
        return tiny_config(
            tiny_model_dir,
            tiny_teacher_dir,
            tmp_path / "prompts.jsonl",
            tmp_path / "run",
            score={"engine": "vllm", "launch": launch},
        )

    return build


def opened(config, *, resume):
    prepared = Prepared([], [], {})
    return open_directory(config, prepared, resume=resume, origins={})


def test_secrets_stay_out_of_the_record_and_the_run_goes_on(make):
    config = make(HF_TOKEN="hush", MY_SECRET_KEY="hush", OMP_NUM_THREADS="1")
    layout = opened(config, resume=False)
    assert "hush" not in layout.config_json.read_text()
    kept = load_run(layout).score.launch.env
    assert kept == {"HF_TOKEN": "***", "MY_SECRET_KEY": "***", "OMP_NUM_THREADS": "1"}
    assert config.score.launch.env["HF_TOKEN"] == "hush", "the server is given it"
    for again in (config, make(HF_TOKEN="another"), make()):
        assert opened(again, resume=True).root == layout.root
    with pytest.raises(ConfigError, match=r"started with seed=0"):
        opened(config.model_copy(update={"seed": 1}), resume=True)
