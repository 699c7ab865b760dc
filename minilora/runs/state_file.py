"""The state of a run in one file, `state.safetensors`: a resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from minilora.backend import to_device, to_host
from minilora.formats.files import open_safetensors, write_safetensors
from minilora.training.loss_scale import LossScale
from minilora.training.state import State

STATE_FILE = "state.safetensors"
NUMBERS = ("step", "tokens", "seconds", "best_loss", "best_step", "evaluations_without_gain")


def save_state(state: State, folder: Path) -> None:
    """Write the state beside the old file, then replace that file: a kill leaves a whole file, the old or the new."""
    tensors = {f"trainable.{name}": to_host(p) for name, p in state.trainable.items()}
    tensors |= {f"optimizer.{name}": to_host(a) for name, a in state.optimizer.state().items()}
    tensors |= {f"best.{name}": a for name, a in state.best.items()}
    tensors["order"] = state.order.permutation
    numbers = {name: number for name in NUMBERS if math.isfinite(number := getattr(state, name))}
    metadata = {
        "numbers": json.dumps(numbers),
        "order": json.dumps([state.order.epoch, state.order.cursor]),
        "rng": json.dumps(state.rng.bit_generator.state),
        "data": state.data,
        "loss_scale": json.dumps(asdict(state.loss_scale)),
    }
    write_safetensors(folder / STATE_FILE, tensors, metadata)


def load_state(state: State, folder: Path) -> None:
    """Restore the saved state in place, because the model shares these arrays. ValueError if it is another run's."""
    path = folder / STATE_FILE
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    targets = {f"trainable.{name}": p for name, p in state.trainable.items()}
    targets |= {f"optimizer.{name}": a for name, a in state.optimizer.state().items()}
    for name, target in targets.items():
        if name not in tensors or tensors[name].shape != target.shape:
            raise ValueError(f"{path} does not fit this run: {name} is missing or has another shape")
        target[...] = to_device(tensors[name])
    if metadata["data"] != state.data or len(tensors["order"]) != len(state.order.permutation):
        raise ValueError(f"{path} does not fit this run: the data has changed since it was saved")
    state.order.permutation = tensors["order"]
    state.order.epoch, state.order.cursor = json.loads(metadata["order"])
    state.rng.bit_generator.state = json.loads(metadata["rng"])
    if "loss_scale" in metadata:  # states of older versions have none
        state.loss_scale = LossScale(**json.loads(metadata["loss_scale"]))
    state.best = {name.removeprefix("best."): a for name, a in tensors.items() if name.startswith("best.")}
    for name, number in ({"best_loss": math.inf} | json.loads(metadata["numbers"])).items():
        setattr(state, name, number)
