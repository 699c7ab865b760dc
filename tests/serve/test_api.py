"""OpenAI's interface over HTTP: what is answered to whom, and how a mistake is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import good
from support.served import NAMES, Library, sse

pytest.importorskip("starlette", reason="the server needs Starlette: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="Starlette's test client needs httpx")
from starlette.testclient import TestClient

from minilora.serve.api import Door, application
from minilora.serve.scheduler import Scheduler

LOCAL = frozenset({"127.0.0.1", "::1"})
CHAT: dict[str, Any] = {"model": "a", "messages": [{"role": "user", "content": "one and two"}], "temperature": 0}
TEXT: dict[str, Any] = {"model": "a", "prompt": "one and", "max_tokens": 12, "temperature": 0}


def client_of(library: Library, door: Door, rows: int = 4, queue: int = 8, **limits: int) -> TestClient:
    return TestClient(
        application(library.served(**limits), Scheduler(rows, queue), door), base_url="http://127.0.0.1:8000"
    )


@pytest.fixture(scope="module")
def client(library: Library) -> Iterator[TestClient]:
    with client_of(library, Door(hosts=LOCAL)) as client:
        yield client


def complete(client: TestClient, **more: Any) -> Any:
    response = client.post("/v1/completions", json=TEXT | more)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: TestClient, **more: Any) -> Any:
    response = client.post("/v1/chat/completions", json=CHAT | more)
    assert response.status_code == 200, response.text
    return response.json()


def text(client: TestClient, **more: Any) -> str:
    return str(complete(client, **more)["choices"][0]["text"])


# --- What is answered ---


@pytest.mark.parametrize("name", NAMES)
def test_model_chooses_the_base_or_an_adapter(client: TestClient, library: Library, name: str) -> None:
    answer = complete(client, model=name)
    assert answer["model"] == name and answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == library.alone(name, "one and", 12)
    assert len({library.alone(name, "one and", 12) for name in NAMES}) == len(NAMES)


def test_a_conversation_goes_through_the_chat_template(client: TestClient, library: Library) -> None:
    prompt = library.tokenizer.chat(CHAT["messages"], add_generation_prompt=True)
    answer = chat(client, max_completion_tokens=9)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == library.alone("a", prompt, 9) and choice["finish_reason"] == "length"
    length = len(library.tokenizer.encode(prompt))
    assert answer["usage"] == {"prompt_tokens": length, "completion_tokens": 9, "total_tokens": length + 9}
    parts = [{"role": "user", "content": [{"type": "text", "text": "one and"}, {"type": "text", "text": " two"}]}]
    assert chat(client, max_tokens=9, messages=parts)["choices"] == answer["choices"]


def test_an_answer_ends_at_the_turns_end_at_a_stop_string_or_at_its_length(
    client: TestClient, library: Library
) -> None:
    whole = library.alone("a", "one and", 12)
    (choice,) = complete(client, stop=[whole[5:8], "never"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(whole[5:8])], "stop")
    assert complete(client, stop=whole[5:8])["choices"] == [choice]
    (choice,) = complete(client)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole, "length")
    limited = chat(client)
    assert limited["usage"]["completion_tokens"] == 40 or limited["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [{}, {"stop": "."}, {"n": 3, "temperature": 1.5, "seed": 4}, {"logprobs": True}])
def test_a_stream_tells_in_chunks_what_is_else_told_at_once(client: TestClient, more: dict[str, Any]) -> None:
    for path, body in (("chat/completions", CHAT | more), ("completions", TEXT | more)):
        if path == "completions" and "logprobs" in more:
            body = body | {"logprobs": 2}
        whole = client.post(f"/v1/{path}", json=body).json()
        with client.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, last = sse(response.iter_lines())
        assert last == "[DONE]"
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} and "usage" not in chunks[0]
        for i, expected in enumerate(whole["choices"]):
            own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == i]
            if "message" in expected:
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                said = "".join(choice["delta"]["content"] for choice in own)
                assert said == expected["message"]["content"]
            else:
                assert "".join(choice["text"] for choice in own) == expected["text"]
            reasons = [choice["finish_reason"] for choice in own]
            assert reasons == [None] * (len(own) - 1) + [expected["finish_reason"]]
            if more.get("logprobs"):
                key = "content" if "message" in expected else "tokens"
                told = [entry for choice in own if choice["logprobs"] for entry in choice["logprobs"][key]]
                assert told == expected["logprobs"][key] and told


def test_a_stream_tells_the_usage_if_it_is_asked_for(client: TestClient) -> None:
    body = TEXT | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body) as response:
        *chunks, usage, _ = sse(response.iter_lines())
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"] == complete(client)["usage"]


def test_probabilities_are_told_in_both_forms(client: TestClient, library: Library) -> None:
    (choice,) = complete(client, logprobs=3, max_tokens=4)["choices"]
    told = choice["logprobs"]
    assert told["tokens"] == [library.tokenizer.piece(t) for t in library.tokens_alone("a", "one and", 4)]
    assert [len(best) for best in told["top_logprobs"]] == [3] * 4 and told["text_offset"][0] == 0
    assert [max(best.values()) for best in told["top_logprobs"]] == told["token_logprobs"], "greedy takes the best"
    assert chat(client)["choices"][0]["logprobs"] is None
    (choice,) = chat(client, logprobs=True, top_logprobs=2, max_tokens=3)["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 3
    for entry in entries:
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
        assert len(entry["top_logprobs"]) == 2
    (choice,) = chat(client, logprobs=True, max_tokens=1)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_draws_follow_their_seed_and_each_choice_has_its_own(client: TestClient, library: Library) -> None:
    drawn = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 5}
    texts = [choice["text"] for choice in complete(client, n=3, **drawn)["choices"]]
    assert [choice["text"] for choice in complete(client, n=3, **drawn)["choices"]] == texts
    assert text(client, **drawn) == texts[0] and len(set(texts)) == 3
    assert text(client, **drawn | {"seed": 6}) != texts[0]
    flags = "--temp 1.3 --top-p 0.9 --top-k 50 --repetition-penalty 1.1 --seed 5 --max-tokens 12".split()
    model = ["--model", library.folder / "base", "--adapter", library.folder / "a"]
    assert good("generate", *model, "--prompt", "one and", *flags) == f"{texts[0]}\n", "as the command draws"
    assert len({text(client, temperature=2) for _ in range(4)}) > 1, "without a seed, each request draws anew"
    assert text(client, temperature=2, seed=-1) == text(client, temperature=2, seed=-1)


def test_several_prompts_are_each_answered_as_if_alone_texts_or_tokens(client: TestClient, library: Library) -> None:
    prompts = ["one and", "six", "two or three"]
    expected = [library.alone("a", prompt, 12) for prompt in prompts]
    ids = [library.tokenizer.encode(prompt) for prompt in prompts]
    for asked in (prompts, ids):
        answer = complete(client, prompt=asked)
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(expected))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert text(client, prompt=ids[1]) == expected[1]
    pairs = complete(client, prompt=prompts, n=2)["choices"]
    assert [choice["text"] for choice in pairs] == [each for each in expected for _ in range(2)]


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_the_scale_of_an_adapter_goes_from_the_base_to_the_adapter_and_beyond(
    client: TestClient, library: Library, name: str
) -> None:
    assert text(client, model=name, adapter_scale=0) == library.alone("base", "one and", 12)
    assert text(client, model=name, adapter_scale=1) == library.alone(name, "one and", 12)
    places = [
        complete(client, model=name, adapter_scale=scale, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
        for scale in (0, 0.5, 1, 2)
    ]
    assert len({told["token_logprobs"][0] for told in places}) == 4


def test_the_models_are_listed_with_what_the_page_must_know(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [each["id"] for each in listed["data"]] == list(NAMES)
    assert [each["parent"] for each in listed["data"]] == [None] + ["base"] * 4
    assert [each["scalable"] for each in listed["data"]] == [False, True, True, True, False]
    assert all(each["chat"] and each["object"] == "model" for each in listed["data"])
    assert client.get("/v1/models/b").json() == listed["data"][2]


def test_health_counts_rows_and_tokens(client: TestClient) -> None:
    before = client.get("/health").json()["tokens"]
    complete(client)
    while (told := client.get("/health").json())["running"]:
        time.sleep(0.001)
    assert told == {"status": "ok", "running": 0, "waiting": 0, "tokens": told["tokens"], "max_batch": 4, "queue": 8}
    assert told["tokens"] == before + 12


def test_the_page_asks_nothing_of_other_machines(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text


# --- Mistakes ---

WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": None}, 400, "model", "model must be a string"),
    ({"model": 3}, 400, "model", "model must be a string"),
    ({"model": "z"}, 404, "model", "the model 'z' does not exist: there are base, a, b, d, p"),
    ({"temperature": -1}, 400, "temperature", "temperature must be a number from 0"),
    ({"temperature": "hot"}, 400, "temperature", '"hot"'),
    ({"temperature": True}, 400, "temperature", "true"),
    ({"top_p": 0}, 400, "top_p", "top_p must be above 0"),
    ({"top_p": 1.5}, 400, "top_p", "from 0 to 1"),
    ({"top_k": -1}, 400, "top_k", "of 0 or more"),
    ({"max_tokens": 0}, 400, "max_tokens", "of 1 or more, not 0"),
    ({"max_tokens": 2.5}, 400, "max_tokens", "whole number"),
    ({"max_tokens": 41}, 400, "max_tokens", "41 is more than this server gives: 40"),
    ({"n": 0}, 400, "n", "of 1 or more"),
    ({"n": 17}, 400, "n", "17 answers to one request: this server gives 16"),
    ({"seed": 1.5}, 400, "seed", "seed must be a whole number"),
    ({"stop": ""}, 400, "stop", "none of them empty"),
    ({"stop": [1]}, 400, "stop", "stop must be a string"),
    ({"stop": ["x"] * 17}, 400, "stop", "17 strings"),
    ({"stream": "yes"}, 400, "stream", "stream must be true or false"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options", "must be an object, as"),
    ({"adapter_scale": 1000}, 400, "adapter_scale", "from -100 to 100"),
    ({"model": "p", "adapter_scale": 0.5}, 400, "adapter_scale", "virtual tokens"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "from 0.01"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty is not supported"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "frequency_penalty is not supported"),
    ({"logit_bias": {"3": 100}}, 400, "logit_bias", "logit_bias is not supported"),
    ({"temprature": 0.5}, 400, "temprature", "did you mean temperature?"),
]
WRONG_CHAT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": None}, 400, "messages", "messages is missing"),
    ({"messages": []}, 400, "messages", "it is empty"),
    ({"messages": "hello"}, 400, "messages", "not a list of messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages", "message 1 has no content"),
    ({"messages": [{"role": "queen", "content": "x"}]}, 400, "messages", "the role 'queen'"),
    ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "x"}]}, 400, "messages", "the assistant's"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "half of a character"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *(400, "messages", "only parts of the type text"),
    ),
    ({"messages": [{"role": "user", "content": "one " * 1300}]}, 400, "messages", "the model sees 1200"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "response_format is not supported"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"prompt": "x"}, 400, "prompt", "unknown field 'prompt'"),
]
WRONG_TEXT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": None}, 400, "prompt", "prompt is missing"),
    ({"prompt": ""}, 400, "prompt", "the prompt is empty"),
    ({"prompt": []}, 400, "prompt", "the prompt is empty"),
    ({"prompt": {"a": 1}}, 400, "prompt", "prompt must be a string, tokens from 0 to"),
    ({"prompt": [1, -1]}, 400, "prompt", "tokens from 0 to"),
    ({"prompt": [10**9]}, 400, "prompt", "tokens from 0 to"),
    ({"prompt": ["one", 3]}, 400, "prompt", "tokens from 0 to"),
    ({"prompt": ["one"] * 17}, 400, "prompt", "17 prompts in one request"),
    ({"prompt": ["one"] * 9, "n": 2}, 400, "n", "18 answers"),
    ({"echo": True}, 400, "echo", "echo is not supported"),
    ({"suffix": "end"}, 400, "suffix", "suffix is not supported"),
    ({"best_of": 3}, 400, "best_of", "best_of is not supported"),
    ({"logprobs": 21}, 400, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, 400, "logprobs", "whole number"),
]


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "words"),
    [("completions", *case) for case in WRONG + WRONG_TEXT]
    + [("chat/completions", *case) for case in WRONG + WRONG_CHAT],
    ids=str,
)
def test_a_mistake_is_told_by_openais_object_which_names_the_field(
    client: TestClient, path: str, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    body = {key: value for key, value in ((CHAT if "chat" in path else TEXT) | fields).items() if value is not None}
    response = client.post(
        f"/v1/{path}", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"] and error["code"]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
names = st.sampled_from(
    [
        *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream"),
        *("stream_options", "logprobs", "top_logprobs", "adapter_scale", "repetition_penalty", "ignore_eos"),
        *("tools", "response_format", "logit_bias", "presence_penalty", "echo", "user", "nonsense"),
    ]
)


@given(fields=st.dictionaries(names, values, max_size=4), chats=st.booleans())
def test_whatever_a_field_holds_the_request_is_answered_or_refused_by_name(
    client: TestClient, fields: dict[str, Any], chats: bool
) -> None:
    path, body = ("chat/completions", CHAT) if chats else ("completions", TEXT)
    response = client.post(f"/v1/{path}", json=body | fields)
    if response.status_code != 200:
        error = response.json()["error"]
        assert response.status_code in (400, 404) and error["param"] in {*fields, "messages", "prompt", "model"}
    elif fields.get("stream"):
        assert sse(iter(response.text.split("\n")))[-1] == "[DONE]"
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in response.json()["choices"])


def test_fields_that_change_no_answer_are_taken(client: TestClient) -> None:
    neutral = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "presence_penalty": 0,
        "frequency_penalty": 0.0, "logit_bias": {}, "n": 1, "top_p": 1, "stop": None, "seed": None, "stream": False,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False, "suffix": None,
    }  # fmt: skip
    assert complete(client, **neutral)["choices"] == complete(client)["choices"]
    assert chat(client, **neutral)["choices"] == chat(client)["choices"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"), (b"[]", "must be a JSON object"), (b'{"temperature": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"), (b"\xff", "not JSON"), (b"", "not JSON"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_told(client: TestClient, content: bytes, words: str) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_paths_methods_and_types_that_there_are_not_are_told_in_the_same_way(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", "/v1/models/z", 404), ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ):  # fmt: skip
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]
    response = client.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"})
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]


def test_a_name_that_is_not_this_machines_is_refused(client: TestClient) -> None:
    """Else a page of a stranger could let its own name point here."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "evil.example:127", ""):
        response = client.get("/v1/models", headers={"host": host})
        assert response.status_code == 403 and response.json()["error"]["code"] == "wrong_host"
    for host in ("127.0.0.1", "127.0.0.1:1234", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(library: Library) -> None:
    with client_of(library, Door(), max_body=1000) as client:
        response = client.post("/v1/completions", json=TEXT | {"user": "x" * 1000})
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
        assert complete(client, user="x" * 500)["choices"]


def test_the_key_opens_and_nothing_else_does(library: Library) -> None:
    with client_of(library, Door(api_key="sesame")) as client:
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Bearer sésame".encode()}):
            for response in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/completions", json=TEXT, headers=headers),
            ):
                error = response.json()["error"]
                assert response.status_code == 401 and error["code"] == "invalid_api_key"
        assert client.get("/").status_code == client.get("/health").status_code == 200
        client.headers["Authorization"] = "Bearer sesame"
        assert client.get("/v1/models").status_code == 200 and complete(client)["choices"]


def test_prompt_and_answer_together_have_a_limit(library: Library) -> None:
    with client_of(library, Door(), max_length=20) as client:
        response = client.post("/v1/completions", json=TEXT | {"prompt": list(range(3, 23))})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        answer = complete(client, prompt=list(range(3, 20)))
        assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"


def test_a_full_queue_answers_429_and_those_who_wait_are_answered(library: Library) -> None:
    with client_of(library, Door(), rows=1, queue=2, max_tokens=1000) as client:
        long = TEXT | {"max_tokens": 1000, "ignore_eos": True}
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=long))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        while client.get("/health").json()["waiting"] < 2 and not found:
            time.sleep(0.001)
        assert not found, "they did not come together"
        response = client.post("/v1/completions", json=TEXT)
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert [each.json()["usage"]["completion_tokens"] for each in found] == [1000] * 3


def test_what_fails_in_the_model_is_told_whole_or_in_the_stream(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("no room for the cache")

    with client_of(library, Door()) as client:
        monkeypatch.setattr("minilora.serve.scheduler.Decoder.step", full)
        response = client.post("/v1/completions", json=TEXT)
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as stream:
            *_, last = sse(stream.iter_lines())
        assert last["error"]["message"] == "no room for the cache"
        monkeypatch.undo()
        assert complete(client)["choices"]
