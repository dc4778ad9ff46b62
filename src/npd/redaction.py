"""Finds secrets and masks them in text. All of npd's masking is here.

Promises: `mask` hides the passwords of URLs, the values of names and flags that look secret, bearer
tokens, and every value that was remembered. Every `NpdError`, log line, printed line and record of
a config passes through here. Masking twice changes nothing. A secret is not found if it was not
remembered and its name does not look secret.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
# Words in a name of a secret. The first group may also end a longer word (APIKEY), so
# TOKENIZERS_PARALLELISM does not match.
_SECRET = re.compile(
    r"(KEYS?|TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|BEARER|COOKIES?|DSN"
    r"|CONNECTION_STRING|CONN_STR|WEBHOOK)(_|$)"
    r"|(^|_)(AUTH|AUTHORIZATION|PASS|PW|PWD|PSW|CREDS?|JWT|PAT|SAS)(_|$)"
)
# Names whose value is public: a variable's name, a path; PWD is the working directory.
_PUBLIC = re.compile(r"_(ENV|FILE|PATH|DIR|SOCK)$|^(OLD)?PWD$")
# Names of models and programs for other kinds of keys, tokens and passes.
_TECHNICAL = re.compile(
    r"(^|_)(KEY_(VALUES?|PROJ|STATES?|PADDING|LENGTHS?|DIM|SIZE|HEADS?|CACHE)"
    r"|TOKEN_(IDS?|INDEX|TYPES?|COUNTS?|THRESHOLD|BUDGET|LIMIT|EMBD|EMBEDDINGS?)|PASS_(RATE|AT))(_|$)"
    r"|(^|_)(MISSING|UNEXPECTED|MISMATCHED|UNUSED|PUBLIC|PRIMARY|FOREIGN|SORT)_KEYS?$"
    r"|(^|_)(FIRST|SECOND|LAST|FORWARD|BACKWARD|STUDENT|TEACHER)_PASS$"
)
# In running text, values that are not secret unless the name means a password.
_PLAIN = re.compile(r"\d{1,5}|\d{0,9}\.\d{1,20}|true|false|none|null", re.IGNORECASE)
# In running text, names of tokens that are secret; `eos_token=` is a token of a vocabulary.
_KEYRING = re.compile(
    r"(^|[_.-])(HF|HUB|HUGGING\w*|API|ACCESS|AUTH|BEARER|SECRET|REFRESH|SESSION|GITHUB|GH|GITLAB"
    r"|WANDB|CLIENT|USER|SAS|DEPLOY)_?TOKEN$"
)
# The login of a URL, up to the last @ before a slash. A password after `user:` may contain a slash;
# `host:8000/` is a port. Every repetition is bounded, so that no text takes long.
_USERINFO = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)"
    r"(?:(?P<user>[^\s\"'<>/?#@:]{0,200}):(?!\d{1,5}[/?#,])(?P<password>[^\s\"'<>]{0,500})"
    r"|(?P<token>[^\s\"'<>/?#:]{1,500}))@",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\"[^\"]{0,2000}\"|'[^']{0,2000}'|[^\s\"',;&)}\]]+")
_ASSIGNED = re.compile(r"\b(?P<name>[A-Za-z_][\w.-]{0,99})(?P<sign>[\"']?\s{0,9}[=:]\s{0,9})")
_FLAG = re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w-]{0,99})(?P<sign>=|\s{1,9})(?!-)")
# Outside a header, `Bearer` and `Basic` may be ordinary words, followed by a word.
_BEARER = re.compile(
    r"\b(?P<name>Authorization\W{1,9}(?:Bearer|Basic)"
    r"|Bearer(?!\s{1,9}[A-Za-z]{1,19}(?![\w~+/=-]|\.\w))"
    r"|Basic(?!\s{1,9}[A-Za-z-]{1,40}(?![\w~+/=-]|\.\w)))(?P<sign>\s{1,9})(?=[\w.~+/=-]{6})"
)
# Values shorter than _SHORT are masked only as whole words; those shorter than _SHORTEST are not
# remembered.
_SHORT, _SHORTEST = 6, 4

# Everyday words that must not be masked everywhere; AUTH_MODE and the like have such values.
_EVERYDAY = re.compile(
    r"\*+\d*|\.\.\.|\d{,5}|true|false|none|null|auto|(en|dis)abled?|default|standard|basic|bearer"
    r"|required|optional|password|token",
    re.IGNORECASE,
)

_Hide = Callable[[str], str]
_known: set[str] = set()


def looks_secret(name: str) -> bool:
    """Whether a variable, key or flag of this name may hold a secret."""
    word = name.lstrip("-").replace("-", "_").upper()
    is_public = _PUBLIC.search(word) or _TECHNICAL.search(word)
    return _SECRET.search(word) is not None and not is_public


def remember(*values: str) -> None:
    """Make `mask` hide these values, and their quoted forms, from now on."""
    for value in values:
        if len(value) >= _SHORTEST and not _EVERYDAY.fullmatch(value):
            # Bytes that are not UTF-8 are surrogates.
            quoted = quote(value, safe="", errors="backslashreplace")
            forms = {value, unquote(value), quoted, json.dumps(value)[1:-1]}
            _known.update(form for form in forms if len(form) >= _SHORTEST)


def remember_login(user: str, password: str) -> None:
    """Remember a URL's password, and user and password as a request's header encodes them."""
    login = f"{user}:{password}".encode(errors="backslashreplace")
    remember(password, base64.b64encode(login).decode())


def learn(values: object) -> None:
    """Remember the secrets in a config in any form: parsed YAML, or a dumped config."""

    def note(value: str) -> str:
        remember(value)
        return value

    _walk(values, "", note)


def learn_environment(environment: Mapping[str, str]) -> None:
    """Remember the secrets among environment variables; a path is not a secret."""
    for name, value in environment.items():
        if looks_secret(name) and len(value) > _SHORT and not value.startswith(("/", "~", "./")):
            remember(value)


def known_secrets() -> list[str]:
    """All remembered values, longest first."""
    return sorted(_known, key=lambda value: (-len(value), value))


def mask(text: str) -> str:
    """`text` with its secrets masked."""
    text = _in_text(text, lambda _: HIDDEN)
    for secret in known_secrets():
        if secret in text:
            bounds = ("", "") if len(secret) >= _SHORT else (r"(?<!\w)", r"(?!\w)")
            text = re.sub(re.escape(secret).join(bounds), HIDDEN, text)
    return text


def masked(values: Any) -> Any:
    """A config with its secrets masked; different secrets get different masks.

    >>> masked({"urls": ["http://me:one@host", "http://me:two@host"], "env": {"HF_TOKEN": "t"}})
    {'urls': ['http://me:***@host', 'http://me:***2@host'], 'env': {'HF_TOKEN': '***3'}}
    """
    names: dict[str, str] = {}

    def hide(value: str) -> str:
        return names.setdefault(value, f"{HIDDEN}{len(names) + 1 if names else ''}")

    return _walk(values, "", hide)


def comparable(values: Any) -> Any:
    """A config with every secret masked alike, for comparison with a run's record."""
    return json.loads(re.sub(r"\*\*\*\d+", HIDDEN, json.dumps(masked(values))))


def without_login(url: str) -> tuple[str, str, str]:
    """A URL without its login, then the user and the password, still percent-encoded.

    >>> without_login("http://me:one@host:8000/v1")
    ('http://host:8000/v1', 'me', 'one')
    """
    found = _USERINFO.match(url)
    if found is None:
        return url, "", ""
    user = found["user"] if found["token"] is None else found["token"]
    return f"{found['scheme']}{url[found.end() :]}", user, found["password"] or ""


def split_secret_flags(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words of a command line without its secret flags, and the secret values by flag.

    >>> split_secret_flags(["--hf-token", "t", "--port", "1", "--seed=3"])
    (['--port', '1', '--seed=3'], {'hf-token': 't'})
    """
    public: list[str] = []
    secret: dict[str, str] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and looks_secret(name)):
            public.append(word)
        elif equals:
            secret[name.lstrip("-")] = value
        elif waiting and not waiting[0].startswith("-"):
            secret[name.lstrip("-")] = waiting.pop(0)
        else:
            public.append(word)
    return public, secret


def _walk(value: Any, name: str, hide: _Hide) -> Any:
    """A copy of a tree with each secret replaced by `hide`; `name` is the key of `value`."""
    if isinstance(value, Mapping):
        if looks_secret(name.rpartition(".")[2]):
            return {key: _walk(inner, name, hide) for key, inner in value.items()}
        is_named_by_user = name == "teachers"  # a teacher may have any name
        return {
            key: _walk(inner, "" if is_named_by_user else str(key), hide)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return _in_words(value, name, hide)
    if value is None or isinstance(value, bool):
        return value
    if looks_secret(name.rpartition(".")[2]):
        return _hidden(str(value), hide)
    return _in_text(value, hide) if isinstance(value, str) else value


def _in_words(words: Sequence[Any], name: str, hide: _Hide) -> list[Any]:
    """A list, which may be a command line: the value of a flag is the word after it."""
    before = ("", *map(str, words))
    return [
        _walk(
            word,
            flag if flag.startswith("-") and "=" not in flag and not _is_flag(word) else name,
            hide,
        )
        for flag, word in zip(before, words, strict=False)
    ]


def _is_flag(word: object) -> bool:
    return isinstance(word, str) and word.startswith("-")


def _in_text(text: str, hide: _Hide) -> str:
    def hide_login(found: re.Match[str]) -> str:
        if found["token"] is not None:
            return f"{found['scheme']}{_hidden(found['token'], hide)}@"
        return f"{found['scheme']}{found['user']}:{_hidden(found['password'], hide)}@"

    text = _USERINFO.sub(hide_login, text)
    for pattern in (_BEARER, _FLAG, _ASSIGNED):
        text = _hide_values(text, pattern, hide)
    return text


def _hide_values(text: str, pattern: re.Pattern[str], hide: _Hide) -> str:
    """`text` with the values of secret names hidden; the value of another name is searched too."""
    parts: list[str] = []
    at = 0
    while found := pattern.search(text, at):
        parts.append(text[at : found.end()])
        at = found.end()
        if pattern is _BEARER or _means_secret(found["name"], found["sign"]):
            value = _VALUE.match(text, at)
            if value is not None and not _is_plain(found["name"], value[0]):
                parts.append(_quoted(value[0], hide))
                at = value.end()
    return "".join(parts) + text[at:]


def _is_plain(name: str, value: str) -> bool:
    """Whether a value is a placeholder, or too simple for a secret of this name."""
    if value in ("VALUE", "..."):
        return True
    is_password = re.search(r"PASS|PW|PSW|SECRET", name.upper()) is not None
    return not is_password and _PLAIN.fullmatch(value.rstrip(".")) is not None


def _means_secret(name: str, sign: str) -> bool:
    """Whether a name in running text means a secret; in `KEY=VALUE` and `eos_token: 2` it does
    not."""
    name = name.rpartition(".")[2]
    if not looks_secret(name) or name.startswith("-"):
        return looks_secret(name)
    word = name.replace("-", "_").upper()
    is_variable = name.isupper() and "_" in name
    if word.endswith("_TOKEN") and not (is_variable or _KEYRING.search(word)):
        return False
    is_prose = ":" in sign and sign[0] not in "\"'"  # `token: ...` in a sentence
    return word not in ("KEY", "KEYS") and not (is_prose and not re.search(r"_|^AUTHOR", word))


def _quoted(value: str, hide: _Hide) -> str:
    """The hidden value in its original quotes."""
    if value[0] in "\"'":
        return f"{value[0]}{_hidden(value[1:-1], hide)}{value[0]}"
    return _hidden(value, hide)


def _hidden(value: str, hide: _Hide) -> str:
    is_masked = re.fullmatch(r"\*\*\*\d*", value) is not None
    return value if is_masked or not value else hide(value)
