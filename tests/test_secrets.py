"""Secrets: masked wherever npd writes, prints or records, by one rule for all ways out."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

import test_hostile_servers as hostile
from npd.config import RunConfig
from npd.config.load import dump_config, load_config
from npd.errors import ConfigError, RunError
from npd.redaction import (
    learn,
    learn_environment,
    looks_secret,
    mask,
    masked,
    remember,
    remember_login,
    without_login,
)
from npd.terminal import LineFormatter
from npd.text import shown
from test_server_process import ENGINE


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "API_KEY", "APIKEY", "DB_PASSWD", "X_AUTH", "PGPASS"
          "WORD", "MY_CREDENTIALS", "SMTP_PASS", "MY_PWD", "A_BEARER", "A_COOKIE", "SENTRY_DSN",
          "CLIENT_SECRET", "KEY", "--hf-token", "--api-key", "--ssl-keyfile-password", "hf_token")),
        *((name, False) for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
          "--max-num-batched-tokens", "--tokenizer", "api_key_env", "SSH_AUTH_SOCK", "row_tokens",
          "AUTHOR", "PATH", "student_pass", "KEY_FILE", "max_new_tokens")),
    ],
)  # fmt: skip
def test_names_give_secrets_away(name, is_secret):
    assert looks_secret(name) is is_secret


HIDDEN = [
    "http://user:{}@host:8000/v1 fails",
    "http://{}@host",
    "http://a:8000/v1,http://me:{}@b",
    "got b'Bearer {}4': no such key",
    "http://user:pa/{}@host",
    "postgres://a:{}@b/c",
    "redis://:{}@h:1",
    "http://host/v1?api_key={}&x=1",
    "--hf-token {} --port 1",
    "--api-key={}",
    "--set generate.launch.env.HF_TOKEN={}",
    "--set generate.launch.env={{DB_PASSWD: {}, X: 1}}",
    "{{'HF_TOKEN': '{}'}}",
    '{{"x": {{"api_key": "{}"}}}}',
    "Authorization: Bearer {}",
    "Authorization: Basic {}",
    "Illegal header value b'Bearer {}\\n'",
    "Server=db;User Id=me;Password={};",
    "a=b MY_CREDENTIALS={} c",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_in_running_text(text):
    text = text.format("unknown-canary")
    for found in (mask(text), str(RunError(text)), shown(text, 500)):
        assert "canary" not in found
        assert "***" in found
        assert mask(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "write it as KEY=VALUE, e.g. --set train.lr=1e-5",
        "is the right key in the environment variable that api_key_env names?",
        "eos_token=2, pad_token: <pad>, last token: 5",
        "http://10.0.0.5:8000/v1/completions refuses (404)",
        "http://a:8000/x@main, http://b:80/v1",
        "eos_token_id=128001, num_key_value_heads: 3, 'pad_token_id': None, [key_proj=4096]",
        '{"eos_token_id": [1, 128009], "tokenizer.ggml.token_type": [3]}',
        "query_key_value: expected (3, 4), unexpected_keys=['a.weight'], past_key_values: none",
        "use_auth_token=True, pass_rate=0.53, forward_pass: 12 s",
        "Basic arithmetic. Bearer documents, Basic JavaScript, Basic problem-solving",
        "the key: a letter",
        "set api_key_env: NPD_API_KEY",
        "--max-num-batched-tokens 2048 --tokenizer x",
        "hf://datasets/x@main/a.parquet",
        "resume with npd run run.yaml --set score.urls=... --resume",
    ],
)
def test_what_is_no_secret_stays(text):
    assert mask(text) == text


@pytest.mark.parametrize("unit", ["a", "a.b-", 'a="', "://", "x://u:", "--a ", "a=a=", "TOKEN:"])
def test_no_text_takes_long(unit):
    started = time.monotonic()
    mask(unit * (60_000 // len(unit)))
    assert time.monotonic() - started < 30


def test_what_was_learned_is_found_however_it_is_quoted():
    launch = {"args": ["--hf-token", "flag-canary"], "env": {"MY_PASS": 'env "canary"', "N": 1}}
    learn({"score": {"urls": ["http://me:learned%2Fcanary@h"], "launch": launch}})
    learn_environment({"A_TOKEN": "inherited-canary", "PWD": "/public", "B_KEY": "/a/path"})
    for form in ("learned/canary", "learned%2Fcanary", "flag-canary", 'env "canary"',
                 'env \\"canary\\"', "inherited-canary"):  # fmt: skip
        assert mask(f"x{form}y") == "x***y"
    assert mask("/public /a/path") == "/public /a/path"


def test_a_teacher_may_be_called_anything():
    teachers = {"teachers": {"auth": "/models/authors", "keys": {"model": "/models/piano"}}}
    learn(teachers)
    assert masked(teachers) == teachers
    assert mask("no model in /models/authors") == "no model in /models/authors"


def test_a_word_after_basic_is_learned_by_nobody():
    learn({"data": {"system": "Basic trigonometry. eos_token_id=128001"}})
    assert mask("of trigonometry 128001") == "of trigonometry 128001"


@pytest.mark.parametrize("text", ["password=1234", "DB_PASSWD: 99", "MY_SECRET=true"])
def test_a_short_password_is_one(text):
    assert "***" in mask(text)


def test_a_secret_may_be_any_bytes():
    learn_environment({"DB_PASS": "caf\udce9-canary"})
    learn({"env": {"X_TOKEN": "\ud800-canary"}, "urls": ["http://me:\udce9-canary@h"]})
    remember_login("me", "\ud800-password")
    assert mask("caf\udce9-canary \ud800-canary \udce9-canary") == "*** *** ***"


def test_an_everyday_word_stays_one():
    learn_environment({"X_AUTH": "disabled", "AUTH_TYPE": "password", "TOKEN_MODE": "Standard"})
    assert mask("disabled password Standard") == "disabled password Standard"


def test_a_short_secret_is_no_part_of_words():
    remember("tbl", "zxqv", "true")
    assert mask("zxqv zxqvs true tbl") == "*** zxqvs true tbl"


def test_log_lines_and_their_tracebacks():
    try:
        raise OSError("http://u:traceback-canary@h")
    except OSError as error:
        record = logging.LogRecord(
            "n", 20, "f", 1, "key %s\x1b[2J", ("Bearer line-canary",),
            (type(error), error, error.__traceback__),
        )  # fmt: skip
    line = LineFormatter("%(message)s").format(record)
    assert "canary" not in line
    assert "\x1b" not in line
    assert "OSError" in line


def test_no_setting_of_npds_own_is_taken_for_a_secret():
    settings = load_config("npd", ["student=s", "teacher=t", "data.train=d.jsonl"])
    assert masked(dump_config(settings.config)) == dump_config(settings.config)


def test_a_url_is_one_server_whoever_asks_it():
    assert without_login("http://me:a@b@host:1/v1") == ("http://host:1/v1", "me", "a@b")
    assert without_login("http://host:1/a@b") == ("http://host:1/a@b", "", "")
    assert without_login("http://host:1/v1") == ("http://host:1/v1", "", "")


# A canary in every place a user can put a secret, and every place where it could come out.


@pytest.fixture
def shell(shell, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", "canary-key-1234")
    monkeypatch.setenv("INHERITED_PASSWD", "canary-inherited")
    return shell


def leaks(folder: Path) -> list[str]:
    """The files under a folder with a canary in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if b"canary" in path.read_bytes()]


SETS = {
    "args": 'score.launch.args=["--do", "exit", "--show-secrets", "--hf-token", "canary-flag", '
    '"--my-secret=canary-other"]',
    "env": "score.launch.env={HF_TOKEN: canary-env, DB_PASSWD: canary-passwd, X_AUTH: canary-auth,"
    " DATABASE: postgres://me:canary-dsn@host/db}",
    "command": f"score.launch.command={json.dumps(list(ENGINE))}",
}


def test_no_secret_of_a_launched_server_comes_out(shell):
    sets = [word for value in SETS.values() for word in ("--set", value)]
    asked = (
        "run.yaml",
        "--set",
        "score.engine=vllm",
        "--set",
        "score.launch.start_timeout=60",
        *sets,
    )
    found = [shell.npd("doctor", *asked), shell.npd("config", *asked), shell.npd("run", *asked)]
    log = "".join(path.read_text() for path in shell.layout.logs.glob("server-*.log"))
    assert "HF_TOKEN ***" in log, "the server printed what it was given"
    found += [shell.npd("show", "run")]
    found += [shell.npd("run", *asked), shell.npd("run", *asked, "--resume")]
    assert found[2].complaint(1)
    assert "holds a run already" in found[4].complaint(2)
    assert "no room for it" in found[5].complaint(1), "the record compares equal"
    for outcome in found:
        assert "canary" not in outcome.out + outcome.err
    assert leaks(shell.layout.root) == []


def test_no_secret_of_a_server_that_runs_comes_out(shell):
    """Not even from one that says in each answer what it was sent."""

    def echo(send, request):
        lines = [x for x in request.decode().split("\r\n") if x.startswith("Authorization")]
        body = json.dumps({"error": f"{lines} canary-key-1234 canary-password"})
        send(f"HTTP/1.1 500 No\r\n\r\n{body}".encode())

    with hostile.serving(echo) as url:
        with_login = url.replace("://", "://me:canary-password@")
        for login in (with_login, url):
            asked = ["run.yaml", "--set", "score.engine=vllm", "--set", f"score.urls=[{login}]"]
            asked += ["--set", "score.api_key_env=CANARY_KEY", "--set", "score.patience=0"]
            asked += ["--set", f"run_dir=run{len(login)}"]
            found = [shell.npd("doctor", *asked, "--json"), shell.npd("config", *asked)]
            found += [shell.npd("run", *asked), shell.npd("show", f"run{len(login)}")]
            found += [shell.npd("run", *asked, "--resume")]
            assert url in found[2].complaint(1)
            assert url in found[4].complaint(1), "the record compares equal"
            for outcome in found:
                assert "canary" not in outcome.out + outcome.err
            assert leaks(shell.folder / f"run{len(login)}") == []


@pytest.mark.parametrize(
    "sets",
    [
        ["score.urls=http://me:canary-set@h"],
        ["score.launch.env.HF_TOKEN=canary-set", "score.launch.env.HF_TOKEN=[canary-set]"],
        ["score.launch.env={HF_TOKEN: {a: canary-set}}"],
        ["score.launch.env={HF_TOKEN: canary-set"],
        ["score.launch.args=--hf-token canary-set"],
        ["hf_token=canary-set"],
        ["score.api_key=canary-set"],
        ["score.engine=vllm", "score.urls=[h://me:canary-set@h]"],
        ["runtime.shared=s3://canary-set:canary-set2@"],
    ],
)
def test_no_complaint_about_a_secret_shows_it(shell, sets):
    found = shell.npd("run", "run.yaml", *(word for value in sets for word in ("--set", value)))
    assert found.code in (1, 2)
    assert "canary" not in found.out + found.err
    assert "error: " in found.err


def test_a_key_in_place_of_its_variables_name_is_refused_unseen(shell):
    found = shell.npd("run", "run.yaml", "--set", "score.api_key_env=sk-canary-123")
    assert "score.api_key_env must be the name of an environment variable" in found.complaint(2)
    assert "canary" not in found.err


def test_errors_of_the_config_mask_in_python_too():
    with pytest.raises(ConfigError) as caught:
        load_config("npd", ["score.launch.env.HF_TOKEN=[canary-python]"])
    assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        RunConfig(score={"launch": {"env": {"HF_TOKEN": ["canary-list"]}}})
    assert "canary" not in str(caught.value)


def test_a_record_with_masked_secrets_can_be_read_again(shell):
    two = "[http://me:canary1@h, http://me:canary2@h:2]"
    settings = load_config("run.yaml", ["score.engine=vllm", f"score.urls={two}"])
    record = masked(dump_config(settings.config))
    assert "canary" not in json.dumps(record)
    assert type(settings.config).model_validate(record).score.urls[1] == "http://me:***2@h:2"


@pytest.mark.parametrize(
    "settings",
    [
        ["score.urls=[http://me:canary-set@h]"],
        ["score.launch.command=[sh]", "score.launch.env={HF_TOKEN: canary-set}"],
        ["score.launch.command=[sh]", "score.launch.args=[--x-token=canary-set, '1']"],
        ["score.launch.command=[sh]", "score.launch.args=[--x-token, canary-set]"],
    ],
)
def test_a_masked_secret_is_not_used_for_one(shell, settings):
    """What `npd config` prints is a config again, but for its secrets."""
    sets = [word for value in ["score.engine=vllm", *settings] for word in ("--set", value)]
    printed = shell.npd("config", "run.yaml", *sets)
    (shell.folder / "again.yaml").write_text(printed.out)
    for command in ("run", "doctor"):
        found = shell.npd(command, "again.yaml")
        assert found.code == 2
        assert "has *** where npd left a secret out" in found.out + found.err
    assert not shell.layout.root.exists()


def test_what_reads_like_a_secret_in_a_setting_that_decides_compares_equal(shell):
    system = "Never tell that MY_PASSWORD=canary-system, see http://me:canary-two@h"
    sets = ["--set", f"data.system={system}", "--set", "schedule.steps=1"]
    sets += ["--set", "schedule.epochs=null", "--set", "schedule.refresh=never"]
    done = shell.npd("run", "run.yaml", *sets)
    assert done.code == 0, done.err
    again = shell.npd("run", "run.yaml", *sets, "--resume", "--set", "generate.patience=1")
    assert again.code == 0, again.err
    assert "already finished" in again.out
    assert "canary" not in shell.layout.config_json.read_text()
    other = [word.replace("canary-system", "another") for word in sets]
    assert "prompts changed" in shell.npd("run", "run.yaml", *other, "--resume").complaint(2)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["score.launch.command=[/nowhere/program]"], "/nowhere/program is not an executable"),
        (["score.launch.command=[run.yaml]"], "run.yaml is not an executable"),
        (["score.launch.venv=nowhere"], "launch.venv nowhere is not a virtual environment"),
        (["score.launch.command=[sh]", "score.launch.env={PATH: /nowhere}"], "sh is not an exec"),
    ],
)
def test_a_server_that_cannot_be_started_leaves_no_folder(shell, sets, says):
    asked = [word for value in ["score.engine=vllm", *sets] for word in ("--set", value)]
    assert says in shell.npd("run", "run.yaml", *asked).complaint(2)
    assert not shell.layout.root.exists()
    assert says in shell.npd("doctor", "run.yaml", *asked).out


def test_errors_name_servers_without_their_login():
    async def facts(server):
        return await server.facts()

    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        hostile.ask("http://me:canary@127.0.0.1:9", facts, limit=20.0)
    assert "canary" not in str(caught.value)
