"""What is asked: the bodies of /v1/chat/completions and /v1/completions, read and checked.

Beside OpenAI's fields there are `adapter_scale` (how strongly the adapter acts; 1 is as trained, 0 is the base), and
three that other servers have too: `top_k`, `repetition_penalty` and `ignore_eos` (only the length ends the answer).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from minilora.data.conversations import fault_of
from minilora.data.prompts import encode_prompt
from minilora.model.generation import Choose, penalised, sampler
from minilora.model.model import Model
from minilora.serve.answer import Ends
from minilora.serve.fields import Fields
from minilora.serve.problem import Problem, wrong
from minilora.serve.served import Served

T = TypeVar("T")
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MOST_BEST = 20  # tokens told with their probabilities at each place
MOST_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int

    def choose(self, choice: int) -> Choose:
        """A `Choose` with a generator of its own. The first choice draws as `generate --seed` does."""
        seed = [self.seed, choice] if choice else self.seed
        drawn = sampler(self.temperature, self.top_k, self.top_p, np.random.default_rng(seed))
        return penalised(drawn, self.repetition_penalty)


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for."""

    prompt: list[int]
    ends: Ends
    choose: Choose


@dataclass(frozen=True)
class Asked:
    chat: bool
    name: str  # base or an adapter
    model: Model
    choices: list[Choice]
    prompt_tokens: int
    best: int | None  # how many probable tokens to tell at each place; None: no probabilities
    stream: bool
    include_usage: bool


def read_chat(body: bytes, served: Served) -> Asked:
    """/v1/chat/completions. Raises Problem, naming the field."""
    fields = Fields(body)
    prompt = _conversation(fields.take("messages"), served)
    most = fields.whole("max_completion_tokens", fields.whole("max_tokens", None, 1), 1)
    best = fields.whole("top_logprobs", None, 0, MOST_BEST)
    if fields.flag("logprobs"):
        best = best or 0
    elif best is not None:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
    return _asked(fields, served, True, [prompt], most, best, "messages")


def read_completion(body: bytes, served: Served) -> Asked:
    """/v1/completions. Raises Problem, naming the field."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt"), served)
    most = fields.whole("max_tokens", min(COMPLETION_TOKENS, served.limits.max_tokens), 1)
    return _asked(fields, served, False, prompts, most, fields.whole("logprobs", None, 0, MOST_BEST), "prompt")


def _asked(
    fields: Fields, served: Served, chat: bool, prompts: list[list[int]], most: int | None, best: int | None, param: str
) -> Asked:
    """The fields that both have. `param` is the name of the field with the prompt."""
    name = fields.text("model")
    model = served.model(name, fields.number("adapter_scale", 1, -100, 100))
    if most is not None and most > served.limits.max_tokens:
        raise wrong("max_tokens", f"max_tokens {most} is more than this server gives: {served.limits.max_tokens}")
    n = fields.whole("n", 1, 1) or 1
    if n * len(prompts) > served.limits.max_choices:
        message = f"{n * len(prompts)} answers to one request: this server gives {served.limits.max_choices}"
        raise wrong("n" if n > 1 else param, message)
    top_p = fields.number("top_p", 1, 0, 1)
    if top_p == 0:
        raise wrong("top_p", "top_p must be above 0")
    seed = fields.take("seed", secrets.randbits(63))
    if type(seed) is not int:
        raise wrong("seed", "seed must be a whole number")
    sampling = Sampling(
        temperature=fields.number("temperature", 1, 0, 100),
        top_k=fields.whole("top_k", 0, 0) or 0,
        top_p=top_p,
        repetition_penalty=fields.number("repetition_penalty", 1, 0.01, 100),
        seed=seed % 2**64,
    )
    stop_ids = _told(param, lambda: served.chat_stop_ids) if chat else served.tokenizer.stop_ids
    stops = _stops(fields.take("stop", []))
    stream = fields.flag("stream")
    if fields.flag("ignore_eos"):
        stop_ids = frozenset()
    include_usage = _include_usage(fields.take("stream_options", {}), stream)
    fields.end()
    choices = []
    for prompt in prompts:
        limit = min(most or served.limits.max_tokens, served.room(model, prompt, param))
        choices += [Choice(prompt, Ends(limit, stop_ids, stops), sampling.choose(i)) for i in range(n)]
    return Asked(chat, name, model, choices, sum(map(len, prompts)), best, stream, include_usage)


def _conversation(messages: Any, served: Served) -> list[int]:
    """The tokens of `messages`, as the model's chat template writes them."""
    if messages is None:
        raise wrong("messages", "messages is missing")
    if isinstance(messages, list):
        messages = [_with_plain_content(message) for message in messages]
    if fault := fault_of(messages) or ("" if messages else "it is empty"):
        raise wrong("messages", f"messages: {fault}")
    if messages[-1]["role"] == "assistant":
        raise wrong("messages", "messages: the last one is the assistant's already: end with the one to be answered")
    return _told("messages", lambda: encode_prompt({"messages": messages}, served.tokenizer))


def _with_plain_content(message: Any) -> Any:
    """The message, a list of parts {"type": "text", "text": "…"} made one text. Parts of other types are refused."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong("messages", "messages: only parts of the type text are supported in a content")
        texts.append(part["text"])
    return message | {"content": "".join(texts)}


def _prompts(prompt: Any, served: Served) -> list[list[int]]:
    """The tokens of each prompt: a string, a list of strings, tokens, or a list of lists of tokens."""
    if prompt is None:
        raise wrong("prompt", "prompt is missing")
    several = prompt if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else [prompt]
    if len(several) > served.limits.max_choices:
        raise wrong("prompt", f"{len(several)} prompts in one request: this server takes {served.limits.max_choices}")
    return [_prompt(each, served) for each in several]


def _prompt(prompt: Any, served: Served) -> list[int]:
    if isinstance(prompt, str):
        return _told("prompt", lambda: encode_prompt({"prompt": prompt}, served.tokenizer))
    size = served.tokenizer.vocab_size
    if isinstance(prompt, list) and all(type(token) is int and 0 <= token < size for token in prompt):
        return prompt
    raise wrong("prompt", f"prompt must be a string, tokens from 0 to {size - 1}, or a list of either")


def _told(param: str, work: Callable[[], T]) -> T:
    """What `work` returns; its complaint becomes one about this field."""
    try:
        return work()
    except ValueError as error:  # half a character, no chat template, or one that refuses the messages
        raise Problem(400, str(error), param, "invalid_value") from error


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise wrong("stop", "stop must be a string or a list of strings, none of them empty")
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"stop has {len(stops)} strings: this server takes {MOST_STOPS}")
    return tuple(stops)


def _include_usage(options: Any, stream: bool) -> bool:
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise wrong("stream_options", 'stream_options must be an object, as {"include_usage": true}')
    if options and not stream:
        raise wrong("stream_options", "stream_options needs stream: true")
    return options.get("include_usage") is True
