"""The state of a run in one file, `state.safetensors`: a resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict, get_type_hints

import numpy as np

from minilora.backend import fill, to_host
from minilora.formats.files import open_safetensors, parsed_json, write_safetensors
from minilora.formats.finite import finite
from minilora.keys import Between, Positive, checked
from minilora.training.loss_scale import LossScale
from minilora.training.state import State

STATE_FILE = "state.safetensors"
Whole: TypeAlias = Annotated[int, Between(0, 2**53)]


class Counts(TypedDict):
    """The numbers that every state has."""

    step: Whole
    tokens: Whole
    seconds: float
    best_step: Whole
    evaluations_without_gain: Whole


class Numbers(Counts, total=False):
    """All numbers of a state. One that is not finite is not there."""

    best_loss: float


NUMBERS = tuple(get_type_hints(Numbers))


class Scale(TypedDict):
    """A loss scale."""

    value: Positive
    steps: Whole


class SavedAlways(TypedDict):
    """The metadata of the file, each entry a text of JSON."""

    numbers: Numbers
    order: list[Whole]
    rng: dict[str, Any]


class Saved(SavedAlways, total=False):
    """The rest of it, which states of older versions may lack."""

    made_from: dict[str, Any]
    cores: Whole
    loss_scale: Scale


def save_state(state: State, folder: Path) -> None:
    """Write the state beside the old file, then replace that file: a kill leaves a whole file, the old or the new."""
    tensors = {f"trainable.{name}": to_host(p) for name, p in state.trainable.items()}
    tensors |= {f"optimizer.{name}": to_host(a) for name, a in state.flat.state(state.optimizer).items()}
    tensors |= {f"best.{name}": a for name, a in state.best.items()}
    tensors["order"] = state.order.permutation
    numbers = {name: number for name in NUMBERS if math.isfinite(number := getattr(state, name))}
    metadata = {
        "numbers": json.dumps(numbers),
        "order": json.dumps([state.order.epoch, state.order.cursor]),
        "rng": json.dumps(state.rng.bit_generator.state),
        "made_from": json.dumps(state.made_from),
        "cores": str(state.cores),
        "loss_scale": json.dumps(asdict(state.loss_scale)),
    }
    write_safetensors(folder / STATE_FILE, tensors, metadata)


def load_state(state: State, folder: Path) -> list[str]:
    """Restore the saved state in place, because the model shares these arrays. ValueError if it is another run's.

    Returns remarks: reasons why the outcome will not be that of an uninterrupted run to the last bit.
    """
    path = folder / STATE_FILE
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        saved = checked(path, {name: parsed_json(path, text) for name, text in (file.metadata() or {}).items()}, Saved)
    targets = {f"trainable.{name}": p for name, p in state.trainable.items()}
    targets |= {f"optimizer.{name}": a for name, a in state.flat.state(state.optimizer).items()}
    best = {name: a for name, a in tensors.items() if name.startswith("best.")}
    like = targets | {name: state.trainable.get(name.removeprefix("best.")) for name in best}
    for name, target in like.items():
        found = tensors.get(name)
        if found is None or target is None or (found.shape, found.dtype) != (target.shape, target.dtype):
            raise ValueError(f"{path} does not fit this run: {name} is missing, unknown, or has another shape or dtype")
    for name, target in targets.items():
        fill(target, finite(path, name, tensors[name]))
    _check_made_from(path, saved.get("made_from", {}), json.loads(json.dumps(state.made_from)))
    order, count = tensors.get("order"), len(state.order.permutation)
    if order is None or not np.array_equal(np.sort(order), np.arange(count)) or len(saved["order"]) != 2:
        raise ValueError(f"{path} does not fit this run: the data has changed since it was saved")
    state.order.permutation = order
    state.order.epoch, state.order.cursor = saved["order"]
    try:
        state.rng.bit_generator.state = saved["rng"]
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{path}: rng is no state of a generator of random numbers ({error})") from error
    if "loss_scale" in saved:  # states of older versions have none
        state.loss_scale = LossScale(**saved["loss_scale"])
    state.best = {name.removeprefix("best."): finite(path, name, a) for name, a in best.items()}
    for name in NUMBERS:
        setattr(state, name, saved["numbers"].get(name, math.inf))
    before = saved.get("cores", state.cores)
    if before == state.cores:
        return []
    return [
        f"{path} is from a run on {before} cores, and here are {state.cores}: the last bits depend on their number; "
        f"OPENBLAS_NUM_THREADS={before} keeps it, where the machine has so many"
    ]


def _check_made_from(path: Path, saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """ValueError, naming what differs, if the run is not made from the same things now as when its state was saved."""
    for what, value in found.items():
        before = saved.get(what, value)  # a state of an older version may not say
        if isinstance(value, dict) and isinstance(before, dict):
            both = sorted(before.keys() & value.keys())
            changed = [f"{name} was {before[name]!r}" for name in both if value[name] != before[name]]
            words = f"its {what} have changed ({', '.join(changed)})" if changed else ""
        else:
            words = f"the {what} has changed" if before != value else ""
        if words:
            raise ValueError(f"{path} does not fit this run: {words} since it was saved. Put that back, or start anew")
