"""The router without HTTP: validated requests in, pieces of text out."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.api.engines import EngineHealth, Engines
from cluster.api.errors import unknown_model
from cluster.api.generation import Choice, Generator
from cluster.api.grammar import Grammars
from cluster.api.metrics import Metrics
from cluster.api.schema import SamplingFields
from cluster.api.settings import RouterSettings
from cluster.api.text import ChoiceText, Piece
from cluster.api.tokens import Tokens
from cluster.contracts import EngineRequest, GrammarSpec, SamplingParams
from cluster.errors import EngineDiedError, OverloadedError, RequestError
from cluster.tls import OPEN, Access

COMPLETION_TOKENS = 16  # what OpenAI's completions generate where the client says nothing


@dataclass(frozen=True)
class Prompts:
    """What a request's generations start from. field: the client's name of it.

    fallback_tokens: new tokens where neither client nor settings say how many; None = what fits the context.
    """

    ids: tuple[tuple[int, ...], ...]
    field: str
    fallback_tokens: int | None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class RouterCore:
    """One model over any number of engines. Made anywhere, used on one event loop. Knows nothing of HTTP and Ray.

    access: to the engine ports; OPEN for engines on this machine that want no secret.
    """

    def __init__(self, model_name: str, tokens: Tokens, settings: RouterSettings | None = None, access: Access = OPEN):
        self.settings = settings or RouterSettings()
        self.model_names = (model_name, *self.settings.aliases)
        self.created = int(time.time())
        self.tokens = tokens
        self.grammars = Grammars()
        self.metrics = Metrics(model_name)
        self.engines = Engines(self.settings, access)
        self._generator = Generator(
            self.engines, self.metrics, self.settings.max_failovers, self.settings.retry_after_s
        )
        self._in_flight = 0

    @classmethod
    def load(
        cls, model_name: str, target: str | Path, settings: RouterSettings | None = None, access: Access = OPEN
    ) -> RouterCore:
        """target: directory of the target's checkpoint, read for its tokenizer. Raises ConfigError."""
        return cls(model_name, Tokens.load(target), settings, access)

    def set_engines(self, addresses: Collection[str]) -> None:
        """The engines' ports as "host:port"; replaces the earlier list. Call it on the event loop."""
        self.engines.set(addresses)

    def health(self) -> tuple[bool, list[EngineHealth]]:
        """Whether tokens can be generated now, and what is known of each engine."""
        engines = self.engines.health()
        return any(engine.problem is None for engine in engines), engines

    def check_model(self, name: str) -> None:
        if name not in self.model_names:
            raise unknown_model(name, self.model_names)

    async def plan(self, request: SamplingFields, prompts: Prompts, response_id: str, salt: str) -> tuple[Choice, ...]:
        """The choices of a request, n for each prompt, in the order of the response. Raises RequestError.

        salt: isolates prefix caches. The same seed gives a prompt the same text alone and among others.
        """
        count = len(prompts.ids) * request.n
        if count > self.settings.max_choices:
            limit = self.settings.max_choices
            raise RequestError(
                f"n is {request.n} for {len(prompts.ids)} prompts: at most {limit} choices a request", "n"
            )
        grammar = await self.grammars.of(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed % (1 << 63)
        deadline = time.time() + self.settings.request_timeout_s
        return tuple(
            self._choice(request, prompts, index, response_id, salt, seed, deadline, grammar) for index in range(count)
        )

    async def generate(self, choices: Sequence[Choice]) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come; leaving early frees them. Raises OverloadedError before the first one."""
        with self._admitted(len(choices)):
            async with contextlib.aclosing(self._generator.run_all(choices)) as pieces:
                async for piece in pieces:
                    yield piece

    async def close(self) -> None:
        """Ends all connections. Requests under way end with EngineDiedError."""
        await self.engines.close()
        self.tokens.close()
        self.grammars.close()

    @contextlib.contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        limit = self.settings.max_in_flight
        if self._in_flight + count > limit:
            raise OverloadedError(
                f"{self._in_flight} choices are under way and the limit is {limit}: try again later",
                self.settings.retry_after_s,
            )
        self._in_flight += count
        self.metrics.running.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= count
            self.metrics.running.set(self._in_flight)

    def _choice(
        self,
        request: SamplingFields,
        prompts: Prompts,
        index: int,
        response_id: str,
        salt: str,
        seed: int,
        deadline: float,
        grammar: GrammarSpec | None,
    ) -> Choice:
        which, choice = divmod(index, request.n)
        prompt = prompts.ids[which]
        limit = self._new_tokens(request, prompts, prompt)
        stop_ids = self._stop_ids(request)
        engine_request = EngineRequest(
            request_id=f"{response_id}-{which}",
            choice=choice,
            prompt_ids=prompt,
            seed=seed,
            max_new_tokens=limit,
            min_new_tokens=request.min_tokens,
            sampling=_sampling(request),
            stop_token_ids=stop_ids,
            grammar=grammar,
            max_draft_tokens=request.draft_limit,
            deadline=deadline,
            cache_salt=salt,
        )
        return Choice(engine_request, ChoiceText(index, self.tokens, request.stop, stop_ids, request.min_tokens))

    def _stop_ids(self, request: SamplingFields) -> frozenset[int]:
        """Raises RequestError for a token, here or in logit_bias, that the target does not have."""
        vocabulary = self.engines.vocabulary or 0
        for field, ids in (
            ("stop_token_ids", request.stop_token_ids),
            ("logit_bias", [token for token, _ in request.logit_bias]),
        ):
            if ids and max(ids) >= vocabulary:
                raise RequestError(f"{field} holds token id {max(ids)}, outside 0..{vocabulary - 1}", field)
        ends = frozenset() if request.ignore_eos else self.tokens.eos_ids
        return frozenset(request.stop_token_ids).union(token for token in ends if token < vocabulary)

    def _new_tokens(self, request: SamplingFields, prompts: Prompts, prompt: tuple[int, ...]) -> int:
        """How many tokens may be generated. Raises RequestError where prompt and limits do not fit the context."""
        context = self.engines.max_context
        if context is None or self.engines.vocabulary is None:
            raise EngineDiedError("no engine has been reached yet: try again later")
        if not prompt:
            raise RequestError(f"{prompts.field} is empty: it has no tokens", prompts.field)
        if (worst := max(prompt)) >= self.engines.vocabulary or min(prompt) < 0:
            worst = worst if worst >= self.engines.vocabulary else min(prompt)
            raise RequestError(
                f"{prompts.field} holds token id {worst}, outside 0..{self.engines.vocabulary - 1}", prompts.field
            )
        room = context - len(prompt)
        if room < 1:
            raise RequestError(
                f"{prompts.field} has {len(prompt)} tokens, but the model's context is {context} tokens, of which at "
                "least one has to be left for the answer: shorten it",
                prompts.field,
            )
        wanted = request.wanted_tokens
        if wanted is not None and wanted > room:
            raise RequestError(
                f"{request.limit_field} is {wanted}, but the model's context is {context} tokens and {prompts.field} "
                f"takes {len(prompt)} of them: ask for at most {room}",
                request.limit_field,
            )
        limit = min(wanted or self.settings.default_max_tokens or prompts.fallback_tokens or room, room)
        if request.min_tokens > limit:
            raise RequestError(
                f"min_tokens is {request.min_tokens}, above the limit of {limit} new tokens", "min_tokens"
            )
        return limit


def _sampling(request: SamplingFields) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        logprobs=request.wanted_logprobs,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
    )
