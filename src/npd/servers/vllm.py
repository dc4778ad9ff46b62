"""A vLLM server (`vllm serve`): the OpenAI-like completions with token ids, and its weight calls.

Promises: what is sampled is the policy asked for, whatever sampling defaults the server was started
with; every response token comes with its id and log-prob. Written against vLLM 0.32; what an older
server lacks is said by name, with the flag that brings it.

The weight calls (`/collective_rpc`, `/pause`, ...) exist only with `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npd.errors import ConfigError
from npd.servers.answers import ending_of, ids_of, logprobs_of, reading
from npd.servers.base import Completion, PromptLogprobs, SamplingSettings, ServerFacts
from npd.servers.http import Connection, Refused, Unavailable

# What a check of health may take before the server counts as gone.
_HEALTH_SECONDS = 5.0
# It refuses to forget prefixes while a request holds some, also just after one was cut off.
_FORGET_TRIES, _FORGET_PAUSE = 5, 0.2
_REMEDY = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment, or have npd start it (launch); where "
    "that does not help its vLLM is too old, npd is written against 0.32"
)


class VllmServer:
    """One vLLM server; see `npd.servers.base.EngineServer`."""

    def __init__(self, connection: Connection, *, refresh_timeout: float) -> None:
        self._connection = connection
        self._refresh_timeout = refresh_timeout
        self._model: str | None = None

    @property
    def name(self) -> str:
        """Its URL."""
        return self._connection.url

    def move(self, connection: Connection) -> None:
        """Be the server at the end of `connection`."""
        self._connection, self._model = connection, None

    async def facts(self) -> ServerFacts:
        """Version, models and limits, and whether it can be given other weights."""
        listed = await self._connection.get("/v1/models")
        version = await self._connection.optional("GET", "/version")
        paused = await self._connection.optional("GET", "/is_paused")
        with reading(self.name):
            cards = listed["data"]
            limits = [int(card["max_model_len"]) for card in cards if card.get("max_model_len")]
            return ServerFacts(
                engine="vLLM",
                version=None if version is None else str(version["version"]),
                models=tuple(str(card["id"]) for card in cards),
                max_context=min(limits, default=None),
                can_refresh=paused is not None,
                is_paused=None if paused is None else bool(paused["is_paused"]),
            )

    async def is_healthy(self) -> bool:
        """Whether it answers and its engine lives."""
        try:
            await self._connection.get("/health", timeout=_HEALTH_SECONDS)
        except (Refused, Unavailable):
            return False
        return True

    async def complete(
        self, prompt: Sequence[int], sampling: SamplingSettings, *, seed: int, model: str | None
    ) -> Completion:
        """Write a response to `prompt`."""
        body = {
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Defaults of the server, or of the model's generation_config.json, are not the policy.
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            # One set of end tokens for all engines: ours.
            **{"ignore_eos": True, "stop_token_ids": list(sampling.stop_ids)},
            "seed": seed,
            # Of the token alone; as ids, so that the server need not spell every token.
            **{"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
        }
        if sampling.banned_ids:
            body["logit_bias"] = {str(token): -100 for token in sampling.banned_ids}
        answer = await self._completions(body, model)
        with reading(self.name):
            return _completion(self.name, answer["choices"][0])

    async def read(self, ids: Sequence[int], k: int, *, model: str | None = None) -> PromptLogprobs:
        """Log-probs of `ids` with the top `k` of each position."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = await self._completions(body, model)
        with reading(self.name):
            return _prompt_logprobs(list(ids), answer["choices"][0]["prompt_logprobs"], k)

    async def hold(self, *, drain: bool) -> None:
        """Take up no new request; let running ones end, or cut them off with what they have."""
        mode = "wait" if drain else "abort"
        await self._admin(f"/pause?mode={mode}")

    async def release(self) -> None:
        """Take requests again."""
        await self._admin("/resume")

    async def load_weights(self, directory: Path) -> None:
        """Take the weights of `directory` in place, and forget cached prefixes."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        await self._admin("/collective_rpc", call)
        await self._forget_prefixes()

    async def _forget_prefixes(self) -> None:
        for _ in range(_FORGET_TRIES):
            answer = await self._admin("/reset_prefix_cache")
            with reading(self.name):
                if answer is None or answer.get("success") is not False:
                    return
            await asyncio.sleep(_FORGET_PAUSE)
        raise Unavailable(self.name, "keeps prefixes that the old weights computed")

    async def load_adapter(self, directory: Path, name: str) -> None:
        """Serve the adapter of `directory` under `name`."""
        body = {"lora_name": name, "lora_path": str(directory)}
        try:
            await self._connection.post(
                "/v1/load_lora_adapter", body, timeout=self._refresh_timeout
            )
        except Refused as error:
            if "already been loaded" in error.cause:
                return
            if error.status != 404:
                raise
            raise ConfigError(
                f"{self.name} cannot take adapters: start it with --enable-lora, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from error

    async def unload_adapter(self, name: str) -> None:
        """No longer serve an adapter."""
        await self._change("/v1/unload_lora_adapter", {"lora_name": name})

    async def tag(self) -> str | None:
        """What it reports as its weight version."""
        answer = await self._connection.optional("GET", "/weight_info")
        with reading(self.name):
            return None if answer is None else str(answer["weight_version"])

    async def set_tag(self, tag: str) -> None:
        """Have it report `tag`, where its version can."""
        await self._change("/update_weight_version", {"new_version": tag})

    async def checksums(self) -> Mapping[str, str]:
        """SHA-256 of its parameters by name; only those of rank 0 of each kind of parallelism."""
        answer = await self._change("/weight_checker", {"action": "checksum"})
        with reading(self.name):
            found: dict[str, str] = {} if answer is None else answer["checksums"]
            return {
                name.rpartition(":")[2].replace(".base_layer.", "."): str(digest)
                for name, digest in found.items()
                if all(part.endswith("0") for part in name.split(":")[:-1])
            }

    async def _completions(self, body: dict[str, Any], model: str | None) -> Any:
        if model is None:
            model = self._model = self._model or await self._served()
        return await self._connection.post("/v1/completions", {"model": model, **body})

    async def _served(self) -> str:
        """The name that requests to the served model itself carry."""
        listed = await self._connection.get("/v1/models")
        with reading(self.name):
            cards = listed["data"]
            return str(next((c["id"] for c in cards if not c.get("parent")), cards[0]["id"]))

    async def _change(self, path: str, body: Mapping[str, Any]) -> Any | None:
        """The answer to a call that older servers do not know; None from those."""
        return await self._connection.optional("POST", path, body, timeout=self._refresh_timeout)

    async def _admin(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return await self._connection.post(path, body, timeout=self._refresh_timeout)
        except Refused as error:
            if error.status in (404, 405):
                raise ConfigError(
                    f"{self.name} cannot be given other weights (no {path.partition('?')[0]}): "
                    f"{_REMEDY}"
                ) from error
            raise


def _completion(server: str, choice: Mapping[str, Any]) -> Completion:
    ids, found = choice.get("token_ids"), choice.get("logprobs")
    if ids is None or found is None:
        raise ConfigError(
            f"{server} answers without token ids and their log-probs (finish_reason "
            f"{choice.get('finish_reason')!r}): npd needs vLLM 0.11 or newer (return_token_ids)"
        )
    logprobs = logprobs_of(found["token_logprobs"], len(ids))
    return Completion(ids_of(ids, len(ids)), logprobs, ending_of(choice.get("finish_reason")))


def _prompt_logprobs(
    ids: list[int], positions: Sequence[Mapping[str, Any]] | None, k: int
) -> PromptLogprobs:
    if positions is None or len(positions) != len(ids):
        raise ValueError("no log-probs of the prompt, or not of all of it")
    entered = positions[1:]  # the first token follows nothing
    own = [entries[str(token)]["logprob"] for token, entries in zip(ids[1:], entered, strict=True)]
    ranked = [
        sorted((e["rank"], int(i), e["logprob"]) for i, e in entries.items())[:k]
        for entries in entered
    ]
    shape = (len(ids) - 1, k)
    return PromptLogprobs(
        logprobs_of(own, len(ids) - 1),
        ids_of([[token for _, token, _ in row] for row in ranked], *shape),
        logprobs_of([[logprob for _, _, logprob in row] for row in ranked], *shape),
    )
