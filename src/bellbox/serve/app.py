"""The application: who may ask, what is answered where."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError, require
from bellbox.inference.batching import Continuation
from bellbox.inference.sampling import Sampling
from bellbox.serve.answers import Answer
from bellbox.serve.chat import ChatTemplate
from bellbox.serve.engine import BusyError, ClosedError, Engine
from bellbox.serve.metrics import CONTENT_TYPE, Metrics
from bellbox.serve.protocol import Chat, Completion, Limits, RefusedError, parse
from bellbox.serve.streaming import EventStream, GoneError, Message, Pieces, Receive, Send, beside, read_body
from bellbox.serve.trial import TRIAL_FILES, trial_routes

if TYPE_CHECKING:
    from fastapi import FastAPI

_OPEN = ("/", "/page.js", "/health", *TRIAL_FILES)
"""Paths that need no key: they say nothing of the model."""
_DEFAULT_TOKENS = 16
"""New tokens of a completion that names no number, as OpenAI's."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Service:
    """What is served, and to whom."""

    name: str
    """Of the model, for clients."""
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    max_tokens: int | None = None
    """New tokens that a text may have; None for what the context leaves."""
    key: str | None = None
    """What clients must present; None on a loopback address only."""
    hosts: tuple[str, ...] = ()
    """Names of this machine that a request may be for, where there is no key: a page elsewhere cannot use another."""
    packed: Path | None = None
    """The model's folder where it is a packed one, for the page that runs it in the browser."""


def build_app(service: Service) -> FastAPI:
    """The ASGI application.

    Raises:
        BellboxError: FastAPI is not installed.
    """
    fastapi, responses = require("fastapi", "serve"), require("starlette.responses", "serve")
    route: Any = require("starlette.routing", "serve").Route
    about = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "bellbox"}
    page, script = (
        files("bellbox.serve").joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.js")
    )

    async def shown(_: Any) -> Any:
        return responses.HTMLResponse(page, headers={"content-security-policy": _POLICY})

    async def shown_script(_: Any) -> Any:
        return responses.Response(script, media_type="text/javascript")

    async def health(_: Any) -> Any:
        alive = service.engine.is_alive
        words = {"status": "ok" if alive else "stopping"}
        return responses.JSONResponse(words, status_code=200 if alive else 503)

    async def metrics(_: Any) -> Any:
        return responses.Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(_: Any) -> Any:
        return responses.JSONResponse({"object": "list", "data": [about]})

    async def model(request: Any) -> Any:
        name = request.path_params["name"]
        if name != service.name:
            return _refusal(responses, _no_model(name, service))
        return responses.JSONResponse(about)

    async def completions(request: Any) -> Any:
        return await _respond(service, responses, request, Completion)

    async def chat(request: Any) -> Any:
        return await _respond(service, responses, request, Chat)

    async def unknown(request: Any, error: Any) -> Any:
        message = f"there is no {request.method} {request.url.path}"
        return _refusal(responses, RefusedError(error.status_code, message, code="not_found"), error.headers)

    async def broken(_: Any, error: Exception) -> Any:  # a defect of ours; uvicorn logs its traceback
        return _refusal(responses, RefusedError(500, f"{type(error).__name__} in the server", "server_error"))

    # Plain routes: what is asked is read and checked here, within limits, before FastAPI would read a body whole.
    # And no pages of documentation, which load scripts from elsewhere.
    app: FastAPI = fastapi.FastAPI(title="Bellbox", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes += [
        route("/", shown),
        route("/page.js", shown_script),
        route("/health", health),
        route("/metrics", metrics),
        route("/v1/models", models),
        route("/v1/models/{name:path}", model),
        route("/v1/completions", completions, methods=["POST"]),
        route("/v1/chat/completions", chat, methods=["POST"]),
        *trial_routes(service.packed),
    ]
    app.add_exception_handler(require("starlette.exceptions", "serve").HTTPException, unknown)
    app.add_exception_handler(Exception, broken)
    app.add_middleware(_Gate, service=service, refuse=lambda error: _refusal(responses, error))
    return app


def _refusal(responses: Any, error: RefusedError, headers: Any = None) -> Any:
    more = dict(headers or {})
    if error.status == 429:
        more["retry-after"] = "1"
    return responses.JSONResponse(error.body(), status_code=error.status, headers=more)


def _no_model(name: str, service: Service) -> RefusedError:
    message = f"no model {name!r} is served here; there is {service.name!r}"
    return RefusedError(404, message, param="model", code="model_not_found")


async def _respond(service: Service, responses: Any, request: Any, kind: type[Completion | Chat]) -> Any:
    """A completion or a chat, whole or as a stream."""
    begun = time.monotonic()

    def measured() -> None:
        service.metrics.whole.observe(time.monotonic() - begun)

    try:
        asked = await _asked(service, request, kind)
        # Tokenizing a megabyte takes a while; others are served meanwhile.
        made = await asyncio.to_thread(_continuations, service, asked)
        try:
            pieces = Pieces(service.engine, made, asked.stops)
        except BusyError:
            raise RefusedError(
                429, "the queue is full; try again later", "rate_limit_error", code="busy"
            ) from None
        except ClosedError:
            raise RefusedError(503, "the server is stopping", "server_error", code="stopping") from None
    except RefusedError as error:
        return _refusal(responses, error)
    except BellboxError as error:
        return _refusal(responses, RefusedError(400, str(error)))
    except GoneError:
        return responses.Response(status_code=499)
    answer = Answer(kind is Chat, service.name, pieces, len(made), _prompt_tokens(asked, made))
    if asked.stream:

        def close() -> None:
            pieces.close()
            measured()

        return EventStream(answer.events(asked.with_usage), close)
    try:
        body = await beside(answer.whole(), request.receive)
    except GoneError:
        return responses.Response(status_code=499)
    except RefusedError as error:
        return _refusal(responses, error)
    finally:
        pieces.close()
        measured()
    return responses.JSONResponse(body)


async def _asked(service: Service, request: Any, kind: type[Completion | Chat]) -> Completion | Chat:
    # What a page elsewhere can send without asking first is no application/json.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "the body must be JSON: send content-type: application/json")
    most = service.limits.body_bytes
    stated = request.headers.get("content-length", "0")
    try:
        body = None if int(stated) > most else await read_body(request.receive, most)
    except (TimeoutError, ValueError):
        raise RefusedError(408, "the body did not come in time") from None
    if body is None:
        raise RefusedError(413, f"the body has more than {most:,} bytes")
    asked = parse(kind, body)
    if asked.model is not None and asked.model != service.name:
        raise _no_model(asked.model, service)
    return asked


def _continuations(service: Service, asked: Completion | Chat) -> list[Continuation]:
    """One for each text that is asked for.

    Raises:
        RefusedError, BellboxError: too many or too long, or no chat template.
    """
    if isinstance(asked, Chat):
        if service.template is None:
            raise RefusedError(
                400,
                "the model has no chat template, so it cannot chat: use /v1/completions, or start the server with "
                "--chat-template FILE",
            )
        turns = [{"role": each.role, "content": each.text} for each in asked.messages]
        turns = [
            {**turn, **({"name": each.name} if each.name else {})}
            for turn, each in zip(turns, asked.messages, strict=True)
        ]
        prompts = [service.template.encode(turns)]
        wanted = asked.max_completion_tokens or asked.max_tokens
    else:
        given = asked.prompts
        if len(given) * (asked.n or 1) > service.limits.choices:
            raise _too_many(service)
        prompts = [service.tokenizer.encode(each) if isinstance(each, str) else each for each in given]
        wanted = asked.max_tokens
    count, most, limit = asked.n or 1, service.engine.max_length, service.max_tokens
    if not prompts or not all(prompts):
        raise RefusedError(400, "the prompt is empty; give at least one token", param="prompt")
    if len(prompts) * count > service.limits.choices:
        raise _too_many(service)
    if wanted is not None and limit is not None and wanted > limit:
        raise RefusedError(400, f"max_tokens is {wanted:,}; at most {limit:,} are served", param="max_tokens")
    longest = max(map(len, prompts))
    if longest + (wanted or 1) > most:
        raise RefusedError(
            400,
            f"a prompt of {longest:,} tokens and {wanted or 1:,} new ones are more than the {most:,} that are served; "
            "shorten it or ask for fewer",
            code="context_length_exceeded",
        )
    usual = most if isinstance(asked, Chat) else _DEFAULT_TOKENS
    return [
        Continuation(
            prompt,
            Sampling(
                wanted or min(most - len(prompt), limit or most, usual),
                1.0 if asked.temperature is None else asked.temperature,
                asked.top_k,
                asked.top_p,
                None if asked.seed is None else asked.seed + choice,
                service.tokenizer.end_of_text,
            ),
        )
        for prompt in prompts
        for choice in range(count)
    ]


def _too_many(service: Service) -> RefusedError:
    most = service.limits.choices
    return RefusedError(400, f"a request may ask for {most} texts at most, prompts times n", param="n")


def _prompt_tokens(asked: Completion | Chat, made: list[Continuation]) -> int:
    return sum(len(each.prompt_ids) for each in made[:: asked.n or 1])


class _Gate:
    """Before everything: the key, the host that is asked for; and the count of what was answered."""

    def __init__(self, app: Any, service: Service, refuse: Callable[[RefusedError], Any]) -> None:
        self._app, self._service, self._refuse = app, service, refuse

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            error = self._wrong(scope)
            work: Awaitable[None] = (
                self._app(scope, receive, watched)
                if error is None
                else self._refuse(error)(scope, receive, watched)
            )
            await work
        finally:
            path = scope["path"]
            known = path if path in _OPEN or path in _COUNTED else "other"
            self._service.metrics.requests.labels(known, str(status or 499)).inc()

    def _wrong(self, scope: Message) -> RefusedError | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._service.key is None:
            host = headers.get(b"host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host
            if name.lower() not in self._service.hosts:
                return RefusedError(403, f"this server is not for the host {host!r}", code="wrong_host")
            return None
        if scope["path"] in _OPEN:
            return None
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._service.key.encode())
        if kind.lower() != "bearer" or not right:
            message = "a key is needed: send authorization: Bearer KEY"
            return RefusedError(401, message, "authentication_error", code="invalid_api_key")
        return None


_COUNTED = ("/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
