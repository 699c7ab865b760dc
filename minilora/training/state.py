"""Everything that the next training step depends on, in one file: a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, to_device, to_host
from minilora.formats.files import open_safetensors, write_safetensors
from minilora.training.loss_scale import LossScale
from minilora.training.optimizers import Optimizer
from minilora.training.order import Order

STATE_FILE = "state.safetensors"


@dataclass
class State:
    """What trains, the optimiser's moments, the random generator, the place in the data, and the best so far."""

    trainable: dict[str, Array]
    optimizer: Optimizer
    order: Order
    rng: np.random.Generator
    data: str = ""  # a digest of what it trains on
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    best: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    evaluations_without_gain: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)

    def save(self, folder: Path) -> None:
        """Write the state beside the old one, then put it in its place: a kill leaves one or the other, whole."""
        tensors = {f"trainable.{name}": to_host(p) for name, p in self.trainable.items()}
        tensors |= {f"optimizer.{name}": to_host(a) for name, a in self.optimizer.state().items()}
        tensors |= {f"best.{name}": a for name, a in self.best.items()}
        tensors["order"] = self.order.permutation
        numbers = {name: getattr(self, name) for name in NUMBERS}
        metadata = {
            "numbers": json.dumps(numbers),
            "order": json.dumps([self.order.epoch, self.order.cursor]),
            "rng": json.dumps(self.rng.bit_generator.state),
            "data": self.data,
            "loss_scale": json.dumps(asdict(self.loss_scale)),
        }
        write_safetensors(folder / STATE_FILE, tensors, metadata)

    def load(self, folder: Path) -> None:
        """Go back to the saved state, in place: the model shares these arrays. ValueError if it is another run's."""
        path = folder / STATE_FILE
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        targets = {f"trainable.{name}": p for name, p in self.trainable.items()}
        targets |= {f"optimizer.{name}": a for name, a in self.optimizer.state().items()}
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                raise ValueError(f"{path} does not fit this run: {name} is missing or has another shape")
            target[...] = to_device(tensors[name])
        if metadata["data"] != self.data or len(tensors["order"]) != len(self.order.permutation):
            raise ValueError(f"{path} does not fit this run: the data has changed since it was saved")
        self.order.permutation = tensors["order"]
        self.order.epoch, self.order.cursor = json.loads(metadata["order"])
        self.rng.bit_generator.state = json.loads(metadata["rng"])
        if "loss_scale" in metadata:  # not in states of before there was one
            self.loss_scale = LossScale(**json.loads(metadata["loss_scale"]))
        self.best = {name.removeprefix("best."): a for name, a in tensors.items() if name.startswith("best.")}
        for name, value in json.loads(metadata["numbers"]).items():
            setattr(self, name, value)


NUMBERS = ("step", "tokens", "seconds", "best_loss", "best_step", "evaluations_without_gain")
