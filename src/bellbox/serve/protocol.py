"""What clients may ask: the fields of OpenAI's completions and chat completions, checked before anything runs.

A field that would change the answer and is not served is refused by name, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bellbox.errors import BellboxError

MOST_STOPS, LONGEST_STOP = 4, 256
_SEEDS = 2**63

# Fields of OpenAI's that are taken where they ask for nothing: their values that do, None aside.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_IGNORED = ("user", "store", "metadata", "safety_identifier", "prompt_cache_key")


class RefusedError(Exception):
    """An answer that is no text: an HTTP status and OpenAI's error object.

    Args:
        status: of HTTP.
        message: one line.
        kind: OpenAI's `type`.
        param: the field that it is about.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        message = str(BellboxError(str(self)))  # one printable line, whatever a client sent
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 1 << 20
    choices: int = 16
    """Texts of one request: prompts times `n`."""


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. Values are those of `bellbox generate`, with OpenAI's limits."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    """Not OpenAI's: `extra_body={"top_k": 40}` of its client."""
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, le=_SEEDS - 1025)] | None = None
    """Of the first text; of further ones the numbers after it."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Common):
    """Of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Texts or token ids, one entry for each text to continue."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class TextPart(BaseModel):
    """A part of a message; only text is served."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    content: str | list[TextPart]
    name: Annotated[str, Field(max_length=64)] | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Common):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None


def parse(kind: type[Completion | Chat], body: bytes) -> Completion | Chat:
    """A request's body as one of the two kinds.

    Raises:
        RefusedError: with status 400, naming the field.
    """
    fields = _object(body)
    for name in _IGNORED:
        fields.pop(name, None)
    for name, values in _NEUTRAL.items():
        if name in fields and (value := fields.pop(name)) is not None and not _is_one_of(value, values):
            raise RefusedError(400, f"{name} is not supported by this server; leave it out", param=name)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None
    if len(request.stops) > MOST_STOPS or not all(0 < len(each) <= LONGEST_STOP for each in request.stops):
        message = f"stop takes at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
        raise RefusedError(400, message, param="stop")
    if request.stream_options is not None and not request.stream:
        raise RefusedError(400, "stream_options goes with stream: true", param="stream_options")
    return request


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # Of JSON, true is not 1; but a penalty of 0.0 is none.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _object(body: bytes) -> dict[str, Any]:
    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(fields, Mapping):
        raise RefusedError(400, "the body must be a JSON object")
    return dict(fields)


def _refusal(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return RefusedError(400, f"there is no field {'.'.join(map(str, first['loc']))}", param=name)
    # Of a union pydantic names every member's complaint; one says enough.
    wanted = {"prompt": "a text, token ids, or a list of either", "stop": "a text or a list of texts"}.get(
        name
    )
    message = (
        f"{name}: must be {wanted}" if wanted and first["type"] != "missing" else f"{name}: {first['msg']}"
    )
    return RefusedError(400, message, param=name)
