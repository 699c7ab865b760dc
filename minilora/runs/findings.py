"""A look at what training has done, for the run's page: answers, token by token, and the change of the weights.

All of it is kept in `report.json`, so that the page can be made anew without the model. The work has a budget that is
counted in tokens and not by a clock, so that a run always finds the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.adapters.change import Change, changed_model, changes, effective_rank
from minilora.backend import HostArray, to_host, xp
from minilora.data.batches import Batch
from minilora.data.prompts import last_words, question
from minilora.model.model import Model
from minilora.model.names import HEAD, parameter_count
from minilora.ops.cross_entropy import IGNORE
from minilora.runs.evaluation import drift_of_tokens, log_softmax, losses_of_tokens, outside_text
from minilora.runs.run import Judgement, Run
from minilora.training.step import hidden_states, mean_loss

FINDINGS_FILE = "report.json"
# Of the tokens trained on, the share that is read again for the losses below. Of a small model, LEAST are read at any
# rate; of a larger one than SMALL, fewer by as much as it is larger.
SHARE, LEAST, SMALL = 0.08, 8192, 135_000_000
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_RANKS = 8  # of more ranks, powers of two are tried
ROWS_AT_ONCE = 16
MOST_SINGULAR_VALUES = 256  # are kept for each weight
MOST_ANSWERS, MOST_CHARACTERS = 60, 1500
TOKEN_ROWS, TOKENS_OF_A_ROW = 6, 256
DRIFT_TEXTS, DRIFT_EXAMPLES = 4, 10


def findings(run: Run, before: Judgement, after: Judgement) -> dict[str, Any]:
    """The content of `report.json`. With `inspect` off it is only what needs no more of the model."""
    config = run.adapted.config
    found = {
        "finished": datetime.now().isoformat(sep=" ", timespec="minutes"),
        "model": {"layers": config.num_hidden_layers, "width": config.hidden_size, "vocabulary": config.vocab_size},
        "answers": answers_side_by_side(run, before, after),
    }
    if not run.settings.inspect:
        return found
    tensors = {name: to_host(p) for name, p in run.state.trainable.items()}
    by_module = changes(run.base, run.adapted, run.method, tensors)
    return found | {
        "changes": {module: figures_of(change) for module, change in by_module.items()},
        "less": losses_with_less(run, by_module),
        "tokens": losses_token_by_token(run),
        "drift": drift_token_by_token(run),
    }


def answers_side_by_side(run: Run, before: Judgement, after: Judgement) -> dict[str, Any]:
    """How many answers became right or wrong, and some of them, evenly spread, with the right ones."""
    asked_of = [question(row) or ({"prompt": ""}, "") for row in run.task.held_out_rows[: len(after.answers)]]
    rows = [
        {
            "asked": last_words(asked)[-MOST_CHARACTERS:],
            **{name: text[:MOST_CHARACTERS] for name, text in (("right", right), ("before", old), ("now", new))},
            "was_right": old.strip() == right.strip(),
            "is_right": new.strip() == right.strip(),
        }
        for (asked, right), old, new in zip(asked_of, before.answers, after.answers, strict=True)
    ]
    counts = Counter((row["was_right"], row["is_right"]) for row in rows)
    names = {"kept": (True, True), "gained": (False, True), "lost": (True, False), "wrong": (False, False)}
    return {
        "counts": {name: counts[key] for name, key in names.items()},
        "rows": [rows[i] for i in _evenly(len(rows), MOST_ANSWERS)],
    }


def figures_of(change: Change) -> dict[str, Any]:
    """The size of a change, and its singular values if they were found."""
    sigma = change.singular_values
    return {
        "ratio": _short(change.ratio),
        "norm": _short(change.norm),
        "weight_norm": _short(change.weight_norm),
        "effective_rank": _short(effective_rank(sigma)) if len(sigma) or not change.norm else None,
        "singular_values": [_short(value) for value in sigma[:MOST_SINGULAR_VALUES]],
    }


def losses_with_less(run: Run, by_module: dict[str, Change]) -> dict[str, Any]:
    """The held-out loss with each ΔW cut to rank 1 … r, and scaled by 0 … 1.5; nothing without a ΔW or held-out rows.

    Each is measured on the same rows, evenly spread, whose number the budget decides.
    """
    largest = max((len(change.A) for change in by_module.values()), default=0)
    if not largest or not run.task.held_out:
        return {}
    ranks = ranks_to_try(largest)
    models = len(ranks) + len(SCALES) - 1  # with all ranks and the scale 1 it is the same one
    batches = part_of(run.task.held_out, budget(run) // models)
    with tqdm(total=models, desc="less of it", unit="model", dynamic_ncols=True, leave=False, disable=None) as bar:

        def loss(model: Model) -> float | None:
            found = _short(mean_loss(model, batches))
            bar.update()
            return found

        def less(rank: int | None = None, scale: float = 1.0) -> float | None:
            return loss(changed_model(run.base, run.adapted, by_module, rank, scale))

        whole = loss(run.adapted)
        return {
            "rows": sum(len(batch.tokens) for batch in batches),
            "all_rows": sum(len(batch.tokens) for batch in run.task.held_out),
            "tokens": sum(map(_tokens, batches)),
            "ranks": [{"rank": k, "loss": whole if k == largest else less(rank=k)} for k in ranks],
            "scales": [{"scale": c, "loss": whole if c == 1 else less(scale=c)} for c in SCALES],
        }


def budget(run: Run) -> int:
    """How many tokens the losses with less of the change may read."""
    least = LEAST * min(1.0, SMALL / parameter_count(run.adapted.config))
    return int(max(least, SHARE * run.state.tokens))


def ranks_to_try(largest: int) -> list[int]:
    """1 … r, or powers of two and r."""
    if largest <= MOST_RANKS:
        return list(range(1, largest + 1))
    return [*(2**i for i in range((largest - 1).bit_length())), largest]


def part_of(batches: Sequence[Batch], most_tokens: int) -> list[Batch]:
    """Rows of the batches, evenly spread, with at most so many tokens; one row at least."""
    chosen = within(rows_of(batches), most_tokens)
    return [side_by_side(chosen[start : start + ROWS_AT_ONCE]) for start in range(0, len(chosen), ROWS_AT_ONCE)]


def within(rows: Sequence[Batch], most_tokens: int) -> list[Batch]:
    """As many of the rows, evenly spread, as have at most so many tokens; one at least."""
    lengths = [_tokens(row) for row in rows]
    count = len(rows)
    while count > 1 and sum(lengths[i] for i in _evenly(len(rows), count)) > most_tokens:
        count -= 1
    return [rows[i] for i in _evenly(len(rows), count)]


def rows_of(batches: Sequence[Batch]) -> list[Batch]:
    """Each row as a batch of its own, without padding."""
    rows = (Batch(*(array[i : i + 1] for array in batch)) for batch in batches for i in range(len(batch.tokens)))
    return [Batch(*(array[:, row.segments[0] > 0] for array in row)) for row in rows]


def side_by_side(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch, padded on the right."""
    longest = max(row.tokens.shape[1] for row in rows)
    filler = Batch(tokens=0, labels=IGNORE, positions=0, segments=0)  # type: ignore[arg-type]
    return Batch(
        *(
            np.concatenate([_padded(array, longest, value) for array in arrays])
            for arrays, value in zip(zip(*rows, strict=True), filler, strict=True)
        )
    )


def _padded(array: HostArray, length: int, value: Any) -> HostArray:
    return np.pad(array, ((0, 0), (0, length - array.shape[1])), constant_values=value)


def losses_token_by_token(run: Run) -> list[dict[str, Any]]:
    """A few held-out rows in tokens, each labelled one with its loss before and now."""
    rows = rows_of(run.task.held_out)
    chosen = within([rows[i] for i in _evenly(len(rows), TOKEN_ROWS)], budget(run))
    if not chosen:
        return []
    batch = side_by_side(chosen)
    before, now = losses_of_tokens(run.base, batch), losses_of_tokens(run.adapted, batch)
    return [
        {
            "pieces": _pieces(run, row)[:TOKENS_OF_A_ROW],
            "before": _after_the_first(old[: _tokens(row) - 1]),  # the label of a place is the token that follows it
            "now": _after_the_first(new[: _tokens(row) - 1]),
            "left_out": max(0, _tokens(row) - TOKENS_OF_A_ROW),
        }
        for row, old, new in zip(chosen, before, now, strict=True)
    ]


def drift_token_by_token(run: Run) -> dict[str, Any]:
    """Texts outside the task, each token with the drift of what was expected there, and the largest ones explained."""
    rows = within(rows_of(outside_text(run.tokenizer, DRIFT_TEXTS)), budget(run))
    batch = side_by_side(rows)
    ends = np.cumsum([_tokens(row) for row in rows])
    drifts = np.split(drift_of_tokens(run.base, run.adapted, batch), ends[:-1])
    pieces = [_pieces(run, row) for row in rows]
    texts = [
        {"pieces": words, "drift": _after_the_first(of_text[:-1]), "mean": _short(float(of_text.mean()))}
        for words, of_text in zip(pieces, drifts, strict=True)
    ]
    places = [(text, place) for text, of_text in enumerate(drifts) for place in range(len(of_text) - 1)]
    places.sort(key=lambda at: -drifts[at[0]][at[1]])
    places = places[:DRIFT_EXAMPLES]
    expected = [_expected(run, model, batch, places) for model in (run.base, run.adapted)]
    examples = [
        {
            "drift": _short(float(drifts[text][place])),
            "context": "".join(pieces[text][max(0, place - 15) : place + 1]),
            "next": pieces[text][place + 1],
            "base": expected[0][i],
            "adapted": expected[1][i],
        }
        for i, (text, place) in enumerate(places)
    ]
    return {"texts": texts, "examples": examples}


def _expected(
    run: Run, model: Model, batch: Batch, places: Sequence[tuple[int, int]], count: int = 3
) -> list[list[tuple[str, float | None]]]:
    """The most probable tokens after each of these places in the batch: row and position."""
    rows = xp.asarray([row * batch.tokens.shape[1] + position for row, position in places])
    hidden = hidden_states(model, batch)[rows]
    found = []
    for log_p in to_host(log_softmax(model.sites[HEAD].forward(hidden)[0])).astype(np.float64):
        likely = np.argsort(-log_p, kind="stable")[:count]
        found.append([(run.tokenizer.piece(int(token)), _short(math.exp(log_p[token]))) for token in likely])
    return found


def _pieces(run: Run, row: Batch) -> list[str]:
    return [run.tokenizer.piece(int(token)) for token in row.tokens[0]]


def _after_the_first(values: np.ndarray[Any, Any]) -> list[float | None]:
    """Figures of the tokens that follow, each at its own token: the first has none."""
    return [None, *(_short(float(value)) for value in values[: TOKENS_OF_A_ROW - 1])]


def _tokens(batch: Batch) -> int:
    return int((batch.segments > 0).sum())


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread from the first to the last."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()}) if count else []


def _short(value: float) -> float | None:
    """Six digits, for files and pages that are read; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
