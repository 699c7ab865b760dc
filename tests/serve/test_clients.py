"""The command in a process of its own, asked by the official `openai` client: one at a time, and 64 at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.commands import assert_refused, process, run
from support.served import NAMES, Library, started

pytest.importorskip("starlette", reason="the server needs Starlette: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install -e '.[serve]'")
openai = pytest.importorskip("openai", reason="the official client is not here: pip install -e '.[peers]'")

PROMPTS = ("one and", "two or three or four", "six", "four are odd")
ROWS, LONG = 8, 1000


@pytest.fixture(scope="module")
def address(library: Library) -> Iterator[str]:
    limits = ("--max-batch", ROWS, "--queue", 64, "--max-tokens", LONG)
    with started(*library.flags, *limits) as address:
        yield address


@pytest.fixture
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none is needed", max_retries=0)


def health(client: Any) -> dict[str, Any]:
    told: dict[str, Any] = client.with_options(base_url=str(client.base_url).replace("/v1", "")).get(
        "/health", cast_to=dict[str, Any]
    )
    return told


def until_idle(client: Any, seconds: float = 20) -> None:
    """Wait until no row is left."""
    end = time.monotonic() + seconds
    while (now := health(client))["running"] or now["waiting"]:
        assert time.monotonic() < end, f"rows are left of clients that have gone: {now}"
        time.sleep(0.02)


# --- One at a time ---


def test_the_official_client_lists_asks_and_streams(client: Any, library: Library) -> None:
    assert [model.id for model in client.models.list()] == list(NAMES)
    assert client.models.retrieve("a").id == "a"
    expected = library.alone("a", "one and", 12)
    answer = client.completions.create(model="a", prompt="one and", max_tokens=12, temperature=0, logprobs=2)
    assert answer.choices[0].text == expected and len(answer.choices[0].logprobs.tokens) == 12
    messages = [{"role": "user", "content": "one and"}]
    whole = client.chat.completions.create(
        model="b", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    prompt = library.tokenizer.chat(messages, add_generation_prompt=True)
    assert whole.choices[0].message.content == library.alone("b", prompt, 12)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model="b", messages=messages, max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content and chunks[-1].usage == whole.usage


def test_the_official_client_passes_the_scale_of_an_adapter(client: Any, library: Library) -> None:
    for scale, name in ((0, "base"), (1, "d")):
        answer = client.completions.create(
            model="d", prompt="six", max_tokens=8, temperature=0, extra_body={"adapter_scale": scale}
        )
        assert answer.choices[0].text == library.alone(name, "six", 8)


def test_mistakes_are_the_clients_own_exceptions(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="z", prompt="one")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": "x"}], tools=tools)


def test_the_key_is_asked_for_from_the_flag_or_from_the_environment(library: Library) -> None:
    for flags, environment in ((("--api-key", "sesame"), {}), ((), {"MINILORA_API_KEY": "sesame"})):
        with started("--model", library.folder / "base", *flags, env=os.environ | environment) as address:
            for key, opens in (("sesame", True), ("open", False)):
                client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
                if opens:
                    assert len(list(client.models.list())) == 1
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()


# --- Many at once ---


async def ask(client: Any, name: str, prompt: str, stream: bool) -> str:
    options = {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    if not stream:
        return str((await client.completions.create(**options)).choices[0].text)
    text = ""
    async for chunk in await client.completions.create(**options, stream=True):
        text += chunk.choices[0].text
    return text


async def vanish(client: Any, name: str, prompt: str, way: int) -> None:
    """Ask for a long answer and go away: in the stream, while an answer is waited for, or before it has begun."""
    options = {"model": name, "prompt": prompt, "max_tokens": LONG, "temperature": 0}
    if way == 0:
        stream = await client.completions.create(**options, stream=True)
        async for _ in stream:
            break
        await stream.close()
    else:
        with contextlib.suppress(openai.APITimeoutError):
            await client.with_options(timeout=0.05 * way).completions.create(**options)


def test_64_clients_at_once_with_mixed_adapters_some_of_whom_vanish(
    client: Any, address: str, library: Library
) -> None:
    """Everyone who stays gets what the adapter gives alone, and nothing is left of the others."""

    async def everybody() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as many:
            tasks: list[Any] = []
            for i in range(64):
                name, prompt = NAMES[i % len(NAMES)], PROMPTS[i % len(PROMPTS)]
                if i % 4 == 3:
                    tasks.append(vanish(many, name, prompt, i // 4 % 3))
                else:
                    tasks.append(ask(many, name, prompt, i % 2 > 0))
            return await asyncio.gather(*tasks)

    answers = asyncio.run(everybody())
    for i, answer in enumerate(answers):
        expected = None if i % 4 == 3 else library.alone(NAMES[i % len(NAMES)], PROMPTS[i % len(PROMPTS)], 24)
        assert answer == expected, i
    until_idle(client)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_free_their_rows_at_once(client: Any, library: Library, stream: bool) -> None:
    """In the stream, and while they wait for a whole answer: the tokens that are never computed show it."""
    names = [name for name in NAMES if len(library.tokens_alone(name, "one and", LONG)) == LONG]
    assert names, "no answer is long"
    before = health(client)["tokens"]
    for _ in range(4):
        long = {"model": names[0], "prompt": "one and", "max_tokens": LONG, "temperature": 0}
        if stream:
            chunks = client.completions.create(stream=True, **long)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.03).completions.create(**long)
    until_idle(client)
    assert health(client)["tokens"] - before < 3 * LONG  # all of them would be four times as many


def test_one_client_more_than_the_queue_takes_is_told_to_come_again(library: Library) -> None:
    limits = ("--max-batch", 1, "--queue", 1, "--max-tokens", 180)
    with started(*library.flags, *limits) as address:

        async def everybody() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as many:
                asked = [ask(many, "a", "one and", True) for _ in range(12)]
                return await asyncio.gather(*asked, return_exceptions=True)

        answers = asyncio.run(everybody())
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert 0 < len(refused) < 12 and {a for a in answers if a not in refused} == {library.alone("a", "one and", 24)}
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=20)
        assert client.completions.create(model="a", prompt="six", max_tokens=2).choices[0].text, "retries help"


# --- The command ---


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(library: Library) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(run("serve", "--model", "nowhere", "--port", port), f"--port {port}: cannot listen at 127.0.0.1")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--port", 70000], "--port 70000 is above 65535"),
        (["--max-batch", 0], "--max-batch 0 must be at least 1"),
        (["--queue", -1], "--queue -1 must be at least 0"),
        (["--max-tokens", 0], "--max-tokens 0 must be at least 1"),
        (["--port", 0, "--max-length", 4000], "--max-length 4000 is more than the model sees: 1200"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid is no address"),
        (["--port", 0, "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(library: Library, flags: list[object], named: str) -> None:
    assert_refused(run("serve", "--model", library.folder / "base", *flags), named)


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(run("serve"), "the server needs uvicorn: pip install 'minilora[serve]'")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_though_an_answer_is_under_way(library: Library, number: int) -> None:
    server = process("serve", "--port", 0, *library.flags, "--max-tokens", 180)
    assert server.stdout is not None and server.stderr is not None
    try:
        address = server.stdout.readline().partition("http://")[2].partition("/ ")[0]
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="a", prompt="one and", max_tokens=180, stream=True)
        next(iter(stream))
        server.send_signal(number)
        assert server.wait(20) == 128 + number
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()


def test_whoever_opens_the_server_to_others_without_a_key_is_warned(library: Library) -> None:
    server = process("serve", "--port", 0, "--host", "0.0.0.0", "--model", library.folder / "base")
    assert server.stdout is not None
    server.stdout.readline()
    server.terminate()
    _, complaints = server.communicate(timeout=20)
    assert "remark: whoever reaches this machine can use the server: --api-key" in complaints
