"""The state of a run in one file, `state.safetensors`: a resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.backend import fill, to_host
from minilora.formats.files import open_safetensors, write_safetensors
from minilora.training.loss_scale import LossScale
from minilora.training.state import State

STATE_FILE = "state.safetensors"
NUMBERS = ("step", "tokens", "seconds", "best_loss", "best_step", "evaluations_without_gain")


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
        metadata = file.metadata()
    targets = {f"trainable.{name}": p for name, p in state.trainable.items()}
    targets |= {f"optimizer.{name}": a for name, a in state.flat.state(state.optimizer).items()}
    for name, target in targets.items():
        if name not in tensors or tensors[name].shape != target.shape:
            raise ValueError(f"{path} does not fit this run: {name} is missing or has another shape")
        fill(target, tensors[name])
    _check_made_from(path, json.loads(metadata.get("made_from", "{}")), json.loads(json.dumps(state.made_from)))
    if len(tensors["order"]) != len(state.order.permutation):
        raise ValueError(f"{path} does not fit this run: the data has changed since it was saved")
    state.order.permutation = tensors["order"]
    state.order.epoch, state.order.cursor = json.loads(metadata["order"])
    state.rng.bit_generator.state = json.loads(metadata["rng"])
    if "loss_scale" in metadata:  # states of older versions have none
        state.loss_scale = LossScale(**json.loads(metadata["loss_scale"]))
    state.best = {name.removeprefix("best."): a for name, a in tensors.items() if name.startswith("best.")}
    for name, number in ({"best_loss": math.inf} | json.loads(metadata["numbers"])).items():
        setattr(state, name, number)
    before = int(metadata.get("cores", state.cores))
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
        if isinstance(value, dict):
            both = sorted(before.keys() & value.keys())
            changed = [f"{name} was {before[name]!r}" for name in both if value[name] != before[name]]
            words = f"its {what} have changed ({', '.join(changed)})" if changed else ""
        else:
            words = f"the {what} has changed" if before != value else ""
        if words:
            raise ValueError(f"{path} does not fit this run: {words} since it was saved. Put that back, or start anew")
