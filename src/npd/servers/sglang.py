"""An SGLang server (`sglang.launch_server`): its native `/generate`, and its weight calls.

Written against the source of SGLang 0.5.23 and not run against a real server here: the contract
suite runs it over a fake that speaks the same shapes. What is other than with vLLM:

- `ignore_eos` would switch our end tokens off too, so that the model's own end a response as well;
  a response that ended on one of those alone is refused.
- Log-probs of sampled tokens are those after the temperature: other temperatures than 0 and 1 are
  refused. They are after `banned_ids` too, which is more by the log of what those would have held.
- A seed counts only where the server was started with `--enable-deterministic-inference`.
- There is no pause that drains: a weight update itself waits for what is being written.
- Its tensor hashes are of its own kind: `checksums` is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npd.errors import ConfigError
from npd.servers.answers import ending_of, ids_of, logprobs_of, reading
from npd.servers.base import Completion, PromptLogprobs, SamplingSettings, ServerFacts
from npd.servers.http import Connection, Refused, Unavailable

# Its check of health draws a token, and gives up after 20 s.
_HEALTH_SECONDS = 25.0


class SglangServer:
    """One SGLang server; see `npd.servers.base.EngineServer`."""

    def __init__(self, connection: Connection, *, refresh_timeout: float) -> None:
        self._connection = connection
        self._refresh_timeout = refresh_timeout

    @property
    def name(self) -> str:
        """Its URL."""
        return self._connection.url

    def move(self, connection: Connection) -> None:
        """Be the server at the end of `connection`."""
        self._connection = connection

    async def facts(self) -> ServerFacts:
        """Version, models and limits; every SGLang server can be given other weights."""
        listed = await self._connection.get("/v1/models")
        told = await self._either("/server_info", "/get_server_info")
        with reading(self.name):
            cards = listed["data"]
            limits = [int(card["max_model_len"]) for card in cards if card.get("max_model_len")]
            return ServerFacts(
                engine="SGLang",
                version=None if told is None else str(told.get("version")),
                models=tuple(str(card["id"]) for card in cards),
                max_context=min(limits, default=None),
                can_refresh=True,
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
        """Write a response to `prompt`; ConfigError at a temperature other than 0 and 1."""
        if sampling.temperature not in (0.0, 1.0):
            raise ConfigError(
                f"generate.temperature {sampling.temperature:g}: SGLang tells the log-probs of "
                "tempered samples only. Set it to 1 (the policy itself) or 0, or take another "
                "engine"
            )
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Defaults of the server, or of the model's generation_config.json, are not the policy.
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            "stop_token_ids": list(sampling.stop_ids),
            "sampling_seed": seed,
        }
        if sampling.banned_ids:
            params["logit_bias"] = {str(token): -100.0 for token in sampling.banned_ids}
        answer = await self._generate(prompt, params, model, {})
        with reading(self.name):
            return _completion(self.name, answer["meta_info"], sampling.stop_ids)

    async def read(self, ids: Sequence[int], k: int, *, model: str | None = None) -> PromptLogprobs:
        """Log-probs of `ids` with the top `k` of each position."""
        wanted = {"logprob_start_len": 0, "top_logprobs_num": k}
        answer = await self._generate(ids, {"max_new_tokens": 0, "temperature": 0.0}, model, wanted)
        with reading(self.name):
            return _prompt_logprobs(len(ids), answer["meta_info"], k)

    async def hold(self, *, drain: bool) -> None:
        """Cut off what is being written, and take up no new request; with `drain`, nothing.

        `load_weights` waits for what is being written, and takes up no new request meanwhile.
        """
        if not drain:
            await self._admin("/pause_generation", {"mode": "abort"})

    async def release(self) -> None:
        """Take requests again."""
        await self._admin("/continue_generation", {})

    async def load_weights(self, directory: Path) -> None:
        """Take the weights of `directory` in place, and forget cached prefixes."""
        body = {"model_path": str(directory), "flush_cache": True}
        await self._admin("/update_weights_from_disk", body)

    async def load_adapter(self, directory: Path, name: str) -> None:
        """Serve the adapter of `directory` under `name`."""
        listed = await self._connection.get("/v1/models")
        with reading(self.name):
            if name in [card["id"] for card in listed["data"]]:
                return
        body = {"lora_name": name, "lora_path": str(directory)}
        try:
            await self._admin("/load_lora_adapter", body)
        except Refused as error:
            if "enable-lora" not in error.cause:
                raise
            raise ConfigError(
                f"{self.name} cannot take adapters: start it with --enable-lora, --max-lora-rank "
                "and --lora-target-modules all"
            ) from error

    async def unload_adapter(self, name: str) -> None:
        """No longer serve an adapter."""
        await self._connection.optional(
            "POST", "/unload_lora_adapter", {"lora_name": name}, timeout=self._refresh_timeout
        )

    async def tag(self) -> str | None:
        """What it reports as its weight version."""
        told = await self._either("/model_info", "/get_model_info")
        with reading(self.name):
            found = None if told is None else told.get("weight_version")
            return None if found is None else str(found)

    async def set_tag(self, tag: str) -> None:
        """Have it report `tag`, where its version can."""
        # By default it would cut off all that is being written.
        body = {"new_version": tag, "abort_all_requests": False}
        await self._connection.optional("POST", "/update_weight_version", body)

    async def checksums(self) -> Mapping[str, str]:
        """Nothing that a file's contents could be compared with."""
        return {}

    async def _generate(
        self,
        ids: Sequence[int],
        params: Mapping[str, Any],
        model: str | None,
        wanted: Mapping[str, Any],
    ) -> Any:
        body = {"input_ids": list(ids), "sampling_params": params, "return_logprob": True, **wanted}
        if model is not None:
            body["lora_path"] = model
        return await self._connection.post("/generate", body)

    async def _either(self, path: str, old_path: str) -> Any | None:
        """The answer at `path`, or at what older versions call it."""
        answer = await self._connection.optional("GET", path)
        return answer if answer is not None else await self._connection.optional("GET", old_path)

    async def _admin(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            await self._connection.post(path, body, timeout=self._refresh_timeout)
        except Refused as error:
            if error.status in (404, 405):
                raise ConfigError(
                    f"{self.name} has no {path}: npd needs SGLang 0.5.6 or newer"
                ) from error
            if error.status in (401, 403):
                raise ConfigError(
                    f"{self.name} takes no weights with this key: where it was started with "
                    "--admin-api-key, the key that npd sends must be that one"
                ) from error
            raise


def _completion(server: str, told: Mapping[str, Any], stop_ids: Sequence[int]) -> Completion:
    finish = told.get("finish_reason") or {}
    ending, tokens = finish.get("type"), told.get("output_token_logprobs")
    if tokens is None and ending == "abort":
        tokens = []  # cut off before the first one
    if tokens is None:
        raise ConfigError(
            f"{server} answers without token ids and their log-probs (finish_reason {finish!r}): "
            "npd needs SGLang 0.5.6 or newer"
        )
    ids = ids_of([token[1] for token in tokens], len(tokens))
    if ending == "stop" and not (len(ids) and ids[-1] in stop_ids):
        matched = finish.get("matched")
        raise Refused(
            server,
            200,
            f"ended a response by {matched!r}, which is no end token of the student's tokenizer "
            "or generation_config.json",
        )
    logprobs = logprobs_of([token[0] for token in tokens], len(tokens))
    return Completion(ids, logprobs, ending_of(ending))


def _prompt_logprobs(num_tokens: int, told: Mapping[str, Any], k: int) -> PromptLogprobs:
    own = told.get("input_token_logprobs") or []
    top = told.get("input_top_logprobs") or [[]] * num_tokens
    if len(own) != num_tokens or len(top) != num_tokens:
        raise ValueError("no log-probs of the prompt, or not of all of it")
    ranked = [position[:k] for position in top[1:]]  # the first token follows nothing
    shape = (num_tokens - 1, k)
    return PromptLogprobs(
        logprobs_of([token[0] for token in own[1:]], num_tokens - 1),
        ids_of([[entry[1] for entry in row] for row in ranked], *shape),
        logprobs_of([[entry[0] for entry in row] for row in ranked], *shape),
    )
