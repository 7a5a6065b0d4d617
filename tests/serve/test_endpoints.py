"""The OpenAI endpoints, by OpenAI's own client and by requests that nobody should send."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Server, ask, get

from bellbox.formats.auto import open_model
from bellbox.inference.generation import generate_text

openai: Any = pytest.importorskip("openai", reason="openai is not installed")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    return open_model(folder)


def written(opened: Any, prompt: str, most: int, **settings: Any) -> str:
    tokenizer = opened.load_tokenizer()
    stop = tokenizer.end_of_text
    return "".join(generate_text(opened.model, tokenizer.backend, prompt, most, stop_token=stop, **settings))


@pytest.mark.parametrize("seed", range(4))
def test_a_completion_is_what_generate_writes(client: Any, opened: Any, seed: int) -> None:
    """The same seed gives the same text, streamed or not, with characters that several tokens make up."""
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": seed}
    expected = written(opened, "Once upon", 40, top_k=50, **settings)
    asked: dict[str, Any] = {"model": "small", "prompt": "Once upon", "max_tokens": 40, **settings}
    asked["extra_body"] = {"top_k": 50}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(opened.load_tokenizer().encode("Once upon"))
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].text for each in events if each.choices) == expected
    assert events[-1].usage == whole.usage
    reasons = [each.choices[0].finish_reason for each in events if each.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]


def test_several_prompts_and_texts(client: Any, opened: Any) -> None:
    found = client.completions.create(
        model="small", prompt=["Once", "a bell in"], n=3, max_tokens=9, seed=5, temperature=1
    )
    texts = [each.text for each in sorted(found.choices, key=lambda each: each.index)]
    assert texts == [
        written(opened, prompt, 9, seed=5 + i) for prompt in ("Once", "a bell in") for i in range(3)
    ]
    ids = opened.load_tokenizer().encode("Once")
    by_ids = client.completions.create(model="small", prompt=ids, max_tokens=9, seed=5)
    assert by_ids.choices[0].text == texts[0]
    greedy = client.completions.create(model="small", prompt="Once", max_tokens=9, temperature=0)
    assert greedy.choices[0].text == written(opened, "Once", 9, temperature=0)


def test_stop_strings(client: Any, opened: Any) -> None:
    text = written(opened, "Once", 60, seed=1)
    stop = text[10:14]
    asked: dict[str, Any] = {"model": "small", "prompt": "Once", "max_tokens": 60, "seed": 1, "stop": [stop]}
    found = client.completions.create(**asked)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    events = [each.choices[0].text for each in client.completions.create(**asked, stream=True)]
    assert "".join(events) == text[: text.index(stop)]


def test_a_chat(client: Any, opened: Any) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are a bell."},
        {"role": "user", "content": [{"type": "text", "text": " hello "}, {"type": "text", "text": "world"}]},
    ]
    prompt = "<|system|>You are a bell.\n<|user|>hello world\n<|assistant|>"
    expected = written(opened, prompt, 12, seed=3)
    asked: dict[str, Any] = {"model": "small", "messages": messages, "max_completion_tokens": 12, "seed": 3}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"
    events = list(client.chat.completions.create(**asked, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in events) == expected
    assert events[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_what_the_server_is(server: Server, client: Any) -> None:
    assert [each.id for each in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "bellbox"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")
    assert get(server, "/health")[::2] == (200, b'{"status":"ok"}')
    status, headers, text = get(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"bellbox_generated_tokens_total" in text
    assert b'bellbox_http_requests_total{path="/v1/models",status="200"}' in text
    assert get(server, "/docs")[0] == 404
    assert get(server, "/v1/completions")[0] == 405


GOOD = {"prompt": "Once", "max_tokens": 3, "temperature": 0}
WRONG: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1e6},
    "temperature below": {"temperature": -1},
    "temperature text": {"temperature": "0.5"},
    "top_p": {"top_p": -1},
    "top_p zero": {"top_p": 0},
    "top_k": {"top_k": 0},
    "n": {"n": 1e6},
    "n whole": {"n": 1_000_000},
    "n times prompts": {"n": 10, "prompt": ["a", "b"]},
    "max_tokens": {"max_tokens": 2**31},
    "max_tokens zero": {"max_tokens": 0},
    "max_tokens huge": {"max_tokens": 10**30},
    "max_tokens true": {"max_tokens": True},
    "ids below": {"prompt": [-1]},
    "ids beyond": {"prompt": [5, 100_000]},
    "ids of 2^70": {"prompt": [2**70]},
    "ids that are no numbers": {"prompt": [1.5]},
    "no prompt": {"prompt": ""},
    "no prompts": {"prompt": []},
    "an empty one": {"prompt": [[1], []]},
    "prompt null": {"prompt": None},
    "too long": {"prompt": "Once upon a time " * 600},
    "many": {"prompt": ["a"] * 100_000},
    "seed": {"seed": 2**64},
    "stop": {"stop": ["a"] * 5},
    "stop empty": {"stop": ""},
    "stop long": {"stop": "x" * 10_000},
    "logprobs": {"logprobs": 5},
    "echo": {"echo": True},
    "logit_bias": {"logit_bias": {"5": 100}},
    "penalty": {"frequency_penalty": 0.5},
    "unknown": {"temprature": 0.5},
    "model": {"model": "gpt-4"},
    "options": {"stream_options": {"include_usage": True}},
    "surrogate": {"prompt": "\ud800"},
}


@pytest.mark.parametrize("what", list(WRONG))
def test_extreme_values_are_refused_and_the_next_request_works(server: Server, what: str) -> None:
    begun = time.monotonic()
    status, _, body = ask(server, {**GOOD, **WRONG[what]})
    seconds = time.monotonic() - begun
    assert status in (400, 404)
    error = json.loads(body)["error"]
    assert error["message"]
    assert error["message"].isprintable()
    assert error["type"] == "invalid_request_error"
    assert seconds < 1 or seconds < 20 * reference(server)
    assert ask(server, GOOD)[0] == 200


def reference(server: Server) -> float:
    """Seconds of the cheapest answer: the machine may be loaded."""
    begun = time.monotonic()
    get(server, "/health")
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": Infinity}', "application/json", 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', "application/json", 413),
    ],
)
def test_bodies_that_are_no_request(server: Server, body: bytes, content_type: str, status: int) -> None:
    found = ask(server, body, content_type)
    assert found[0] == status
    assert json.loads(found[2])["error"]["message"]
    assert ask(server, GOOD)[0] == 200


def test_a_conversation_that_the_template_refuses(server: Server) -> None:
    for wrong in (
        [],
        [{"role": "user"}],
        [{"role": "", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ):
        status, _, body = ask(server, {"messages": wrong}, path="/v1/chat/completions")
        assert (status, json.loads(body)["error"]["param"]) == (400, "messages")
