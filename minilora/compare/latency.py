"""The time an answer takes with the base, with the adapter beside it, and with the two merged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minilora.compare.figures import MethodResult
from minilora.compare.rivals import SHOTS
from minilora.compare.trained import merged_model, trained_model
from minilora.data.examples import encode_row
from minilora.data.few_shot import few_shot_rows
from minilora.data.tokenizer import Tokenizer
from minilora.formats.hub import find_model
from minilora.formats.load import load_model
from minilora.model.generation import stream
from minilora.model.model import Model
from minilora.runs.run import default_max_length
from minilora.runs.settings import Settings
from minilora.runs.task import load_data

NEW_TOKENS, REPEATS = 64, 7


def latency(result: MethodResult, settings: Settings) -> dict[str, Any]:
    """Milliseconds for each of 64 new tokens after a held-out prompt, batch 1: "base", "adapted", "merged".

    The three take turns, so that a drift of the machine's speed meets them alike; each figure is a median. If "merged"
    is missing, "not_merged" gives the reason. `settings` may be any trial's: they name the model and the data.
    """
    source = find_model(settings.model, settings.revision).folder
    base, tokenizer = load_model(source)[0], Tokenizer.load(source)
    prompt, shown_prompt = prompts(settings, base, tokenizer, "shots" in result)
    tasks = {"base": (base, prompt)}
    reason = ""
    if "shots" in result:
        tasks["adapted"], reason = (base, shown_prompt), "it is the base, after a longer prompt"
    else:
        held, adapted = trained_model(source, Path(result["folder"]))
        merged, reason = merged_model(source, held, adapted)
        tasks |= {"adapted": (adapted, prompt)} | ({"merged": (merged, prompt)} if merged else {})
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(REPEATS + 1):
        for name, (model, tokens) in tasks.items():
            times[name].append(seconds(model, tokens) / NEW_TOKENS * 1e3)
    # The first repeat warms up.
    medians: dict[str, Any] = {name: statistics.median(series[1:]) for name, series in times.items()}
    return medians | ({"not_merged": reason} if reason else {})


def seconds(model: Model, prompt: Sequence[int]) -> float:
    """The seconds that NEW_TOKENS greedily chosen tokens take. A stop token does not end the answer."""
    started = time.perf_counter()
    for _ in islice(stream(model, [prompt]), NEW_TOKENS):
        pass
    return time.perf_counter() - started


def prompts(settings: Settings, base: Model, tokenizer: Tokenizer, few_shot: bool) -> tuple[list[int], list[int]]:
    """A held-out row up to its answer, and the same prompt with solved rows before it if `few_shot` is set.

    A row of plain text has no answer, so its first NEW_TOKENS tokens are the prompt.
    """
    data = load_data(settings)
    row = (data.test or data.valid)[0]
    shown = few_shot_rows([row], data.train, SHOTS, tokenizer, default_max_length(base), 0)[0][0] if few_shot else row
    examples = [encode_row(prompted, tokenizer, settings.train_on) for prompted in (row, shown)]
    bare, shown_before = (example.tokens[: example.trained.index(True) or NEW_TOKENS] for example in examples)
    return bare, shown_before
