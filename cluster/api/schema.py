"""What clients may send to /v1/completions and /v1/chat/completions, after `cluster.api.body` has cleaned it.

Fields are OpenAI's; those marked as extensions are ours, named as vLLM names them where it has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_BIASED = 1024  # tokens of logit_bias
INT64 = 1 << 63
INT32 = 1 << 31


class Strict(BaseModel):
    """No field is ignored and no type converted (a whole number may stand for a real one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(Strict):
    """continuous_usage_stats (extension): usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Speculation(Strict):
    """Extension. max_draft_tokens: of one step; 0 = plain decoding, None = the engine's choice."""

    max_draft_tokens: int | None = Field(None, ge=0, le=1024)


class JsonSchema(Strict):
    """name, description and strict change nothing: the schema is always followed."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('holds json_schema if, and only if, its type is "json_schema"')
        return self


class StructuredOutputs(Strict):
    """Extension. json: a schema or the text of one. grammar: Lark or GBNF. Exactly one of the fields."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        fields = (self.json_, self.regex, self.choice, self.grammar, self.json_object)
        if sum(field is not None for field in fields) != 1:
            raise ValueError("needs exactly one of json, regex, choice, grammar and json_object")
        return self


class SamplingFields(Strict):
    """What both endpoints have in common."""

    model: Annotated[str, Field(min_length=1)]
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: tuple[str, ...] = ()
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: tuple[tuple[int, float], ...] = ()
    response_format: ResponseFormat = ResponseFormat(type="text")
    # Extensions:
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    top_k: int = Field(0, ge=-1, lt=INT32, description="0 or -1 = off")
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=INT32)]] = []
    max_draft_tokens: int | None = Field(None, ge=0, le=1024)
    speculation: Speculation = Speculation()
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"must be a string or a list of up to {MAX_STOPS} strings")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has {len(stops)} strings; at most {MAX_STOPS} are possible")
        if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"holds a string that has not 1 to {MAX_STOP_CHARACTERS} characters")
        return tuple(stops)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict):
            raise ValueError('must be an object of token ids and numbers, as {"50256": -100}')
        if len(value) > MAX_BIASED:
            raise ValueError(f"holds {len(value)} tokens; at most {MAX_BIASED} are possible")
        return tuple(_bias(token, bias) for token, bias in value.items())

    @model_validator(mode="after")
    def _fields_agree(self) -> SamplingFields:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options is only possible together with stream: true")
        if self.structured_outputs is not None and self.response_format.type != "text":
            raise ValueError("structured_outputs and response_format are both given: give one of them")
        if self.max_draft_tokens is not None and self.speculation.max_draft_tokens not in (None, self.max_draft_tokens):
            raise ValueError("max_draft_tokens and speculation.max_draft_tokens differ: give one of them")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The client's limit of new tokens, if it gave one."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The client's name of that limit."""
        return "max_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        """None, or how many alternatives to each token are to be reported."""
        raise NotImplementedError

    @property
    def draft_limit(self) -> int | None:
        return self.max_draft_tokens if self.max_draft_tokens is not None else self.speculation.max_draft_tokens


class CompletionRequest(SamplingFields):
    """prompt: one or several texts or lists of token ids, as a tuple in either case."""

    prompt: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> tuple[str | tuple[int, ...], ...]:
        if value in ("", []):
            raise ValueError("is empty: give a text or at least one token id")
        several = isinstance(value, list) and isinstance(value[0], str | list)
        prompts = value if several else [value]
        return tuple(_prompt(prompt, f"[{index}]" if several else "") for index, prompt in enumerate(prompts))

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of the prompt are not supported: leave out echo or logprobs")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class Message(Strict):
    """One message; `content` is its text, parts joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = ""
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError('must be a string or a list of {"type": "text", "text": ...}')
        return "\n".join(_part(part, index) for index, part in enumerate(value))

    def for_template(self) -> dict[str, str]:
        """As templates know it: `developer`, OpenAI's later name of the system role, is in none of them."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, **({"name": self.name} if self.name is not None else {})}


class ChatRequest(SamplingFields):
    """chat_template_kwargs (extension): further variables of the chat template, e.g. enable_thinking."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only possible together with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _bias(token: str, bias: Any) -> tuple[int, float]:
    if not token.isascii() or not token.isdecimal() or int(token[:11]) >= INT32:
        raise ValueError(f"names {token[:20]!r}, which is no token id")
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
        raise ValueError(f"of token {token} must be a number in -100..100 (got {str(bias)[:20]})")
    return int(token), float(bias)


def _prompt(value: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(value, str | list) and not value:
        raise ValueError(f"{where} is empty: give a text or at least one token id".strip())
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise ValueError(f"{where} must be a text or a list of token ids, or a list of either".strip())


def _part(part: Any, index: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"part [{index}] is of type {kind!r}: only text is supported")
    if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
        raise ValueError(f'part [{index}] must be {{"type": "text", "text": STRING}}')
    return str(part["text"])
