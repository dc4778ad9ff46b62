"""The client of a vLLM server (`vllm serve`): completions of token ids, and weight updates.

Promises: requests override the server's sampling defaults. Every response token has an id and a
log-prob. Written for vLLM 0.32. If an older server lacks a call, the error names the call and the
flag that enables it.

The weight calls (`/collective_rpc`, `/pause`, ...) exist only with `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npd.engines.base import Completion, PromptLogprobs, SamplingSettings, ServerFacts
from npd.engines.client import Connection, Refused, Unavailable
from npd.engines.responses import ending_of, ids_of, logprobs_of, max_response_bytes, parsing
from npd.errors import ConfigError

# Time limit of a health check.
_HEALTH_SECONDS = 5.0
# vLLM refuses to reset its prefix cache while a request uses it, and briefly after an abort.
_RESET_TRIES, _RESET_PAUSE = 5, 0.2
_REMEDY = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment, or have npd start it (launch); if "
    "that does not help, upgrade its vLLM to 0.32"
)


class VllmServer:
    """One vLLM server; see `npd.engines.base.EngineServer`."""

    def __init__(self, connection: Connection, *, refresh_timeout: float) -> None:
        self._connection = connection
        self._refresh_timeout = refresh_timeout
        self._model: str | None = None

    @property
    def name(self) -> str:
        """Its URL."""
        return self._connection.url

    def reconnect(self, connection: Connection) -> None:
        """Use `connection` from now on."""
        self._connection, self._model = connection, None

    async def facts(self) -> ServerFacts:
        """Version, models, context limit, and whether it supports weight updates."""
        listed = await self._connection.get("/v1/models")
        version = await self._connection.optional("GET", "/version")
        paused = await self._connection.optional("GET", "/is_paused")
        with parsing(self.name):
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
        """Whether it responds and its engine is alive."""
        try:
            await self._connection.get("/health", timeout=_HEALTH_SECONDS)
        except (Refused, Unavailable):
            return False
        return True

    async def complete(
        self,
        prompt: Sequence[int],
        sampling: SamplingSettings,
        *,
        seed: int | None,
        model: str | None,
    ) -> Completion:
        """Generate a response to `prompt`."""
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Overrides defaults of the server and of the model's generation_config.json.
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            # End tokens come from the request, not from the model.
            **{"ignore_eos": True, "stop_token_ids": list(sampling.stop_ids)},
            # Log-probs of sampled tokens only. Ids save the server from detokenising.
            **{"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
        }
        if seed is not None:  # the sampler draws a row with a seed by itself, which is slow
            body["seed"] = seed
        if sampling.banned_ids:
            body["logit_bias"] = {str(token): -100 for token in sampling.banned_ids}
        limit = max_response_bytes(scored=len(prompt), generated=sampling.max_new_tokens)
        answer = await self._completions(body, model, limit)
        with parsing(self.name):
            return _completion(self.name, answer["choices"][0])

    async def read(self, ids: Sequence[int], k: int, *, model: str | None = None) -> PromptLogprobs:
        """Log-probs of `ids` with the top `k` ids of each position."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        limit = max_response_bytes(scored=len(ids), generated=1, k=k)
        answer = await self._completions(body, model, limit)
        with parsing(self.name):
            return _prompt_logprobs(list(ids), answer["choices"][0]["prompt_logprobs"], k)

    async def pause(self, *, drain: bool) -> None:
        """Start no new requests; finish running ones, or abort them with their tokens so far."""
        mode = "wait" if drain else "abort"
        await self._admin(f"/pause?mode={mode}")

    async def resume(self) -> None:
        """Accept requests again after `pause`."""
        await self._admin("/resume")

    async def load_weights(self, directory: Path) -> None:
        """Load the weights of `directory` in place, and reset the prefix cache."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        await self._admin("/collective_rpc", call)
        await self._reset_prefix_cache()

    async def _reset_prefix_cache(self) -> None:
        for _ in range(_RESET_TRIES):
            answer = await self._admin("/reset_prefix_cache")
            with parsing(self.name):
                if answer is None or answer.get("success") is not False:
                    return
            await asyncio.sleep(_RESET_PAUSE)
        raise Unavailable(self.name, "does not drop cached prefixes of the old weights")

    async def load_adapter(self, directory: Path, name: str) -> None:
        """Load the adapter in `directory` and serve it as `name`."""
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
                f"{self.name} does not load adapters: start it with --enable-lora and with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from error

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        await self._change("/v1/unload_lora_adapter", {"lora_name": name})

    async def tag(self) -> str | None:
        """Its weight version; None from older servers."""
        answer = await self._connection.optional("GET", "/weight_info")
        with parsing(self.name):
            return None if answer is None else str(answer["weight_version"])

    async def set_tag(self, tag: str) -> None:
        """Set its weight version; a no-op on older servers."""
        await self._change("/update_weight_version", {"new_version": tag})

    async def _completions(self, body: dict[str, Any], model: str | None, limit: int) -> Any:
        if model is None:
            model = self._model = self._model or await self._served()
        sent = {"model": model, **body}
        return await self._connection.post("/v1/completions", sent, max_bytes=limit)

    async def _served(self) -> str:
        """The name of the base model in requests."""
        listed = await self._connection.get("/v1/models")
        with parsing(self.name):
            cards = listed["data"]
            return str(next((c["id"] for c in cards if not c.get("parent")), cards[0]["id"]))

    async def _change(self, path: str, body: Mapping[str, Any]) -> Any | None:
        """The response to a call that older servers lack; None from those servers."""
        return await self._connection.optional("POST", path, body, timeout=self._refresh_timeout)

    async def _admin(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return await self._connection.post(path, body, timeout=self._refresh_timeout)
        except Refused as error:
            if error.status in (404, 405):
                raise ConfigError(
                    f"{self.name} does not support weight updates (no {path.partition('?')[0]}): "
                    f"{_REMEDY}"
                ) from error
            raise


def _completion(server: str, choice: Mapping[str, Any]) -> Completion:
    ids, found = choice.get("token_ids"), choice.get("logprobs")
    if ids is None or found is None:
        raise ConfigError(
            f"{server} responds without token ids or log-probs (finish_reason "
            f"{choice.get('finish_reason')!r:.200}): npd needs vLLM 0.11 or newer "
            "(return_token_ids)"
        )
    logprobs = logprobs_of(found["token_logprobs"], len(ids))
    return Completion(ids_of(ids, len(ids)), logprobs, ending_of(choice.get("finish_reason")))


def _prompt_logprobs(
    ids: list[int], positions: Sequence[Mapping[str, Any]] | None, k: int
) -> PromptLogprobs:
    if positions is None or len(positions) != len(ids):
        raise ValueError("log-probs are missing for some prompt tokens")
    entered = positions[1:]  # the first token has no context, so no log-prob
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
