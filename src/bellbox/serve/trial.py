"""The page at /try: the packed model itself goes to the browser, where the library runs it as WebAssembly."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from bellbox.errors import require

TRIAL = "/try/"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "worker.js": "text/javascript; charset=utf-8",
    "bellbox.js": "text/javascript; charset=utf-8",
    "bellbox.wasm": "application/wasm",
}
TRIAL_FILES = ("/try", TRIAL, *(TRIAL + name for name in _TYPES))
"""Paths that need no key."""
_MODEL = ("config.json", "model.safetensors", "tokenizer.json")
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ABSENT = (
    "no page at /try: its WebAssembly is not built (make web, in a checkout with emscripten; docs/device.md)"
)


def is_built() -> bool:
    """Whether the library is there as WebAssembly."""
    return all(files("bellbox.serve").joinpath("static", name).is_file() for name in _TYPES)


def trial_routes(packed: Path | None) -> list[Any]:
    """Routes of the page, and of the model beside it.

    Names are looked up in tables, never joined from what is asked, so nothing else can be reached.

    Args:
        packed: the folder of a packed model; None where another kind is served.

    Raises:
        BellboxError: FastAPI is not installed.
    """
    responses, route = require("starlette.responses", "serve"), require("starlette.routing", "serve").Route
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
    static = files("bellbox.serve").joinpath("static")
    shown = {name: static.joinpath(name).read_bytes() for name in _TYPES} if is_built() else {}

    async def page(request: Any) -> Any:
        name = request.path_params.get("name") or "index.html"
        if not shown:
            return responses.PlainTextResponse(ABSENT + "\n", status_code=404)
        if name not in shown:
            return responses.PlainTextResponse("no such file of the page\n", status_code=404)
        return responses.Response(shown[name], headers={**headers, "content-type": _TYPES[name]})

    async def model(request: Any) -> Any:
        name = request.path_params["name"]
        if packed is None or name not in _MODEL or not (packed / name).is_file():
            return responses.PlainTextResponse("no such file of a packed model\n", status_code=404)
        return responses.FileResponse(packed / name, media_type="application/octet-stream", headers=headers)

    async def slash(_: Any) -> Any:
        return responses.RedirectResponse(TRIAL)

    return [
        route("/try", slash),
        route(TRIAL, page),
        route(TRIAL + "{name}", page),
        route(TRIAL + "model/{name}", model),
    ]
