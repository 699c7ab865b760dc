"""Optimisers. They update parameters in place, so that the sites of the model, which share the arrays, see it."""

from minilora.training.optimizers.adafactor import Adafactor
from minilora.training.optimizers.adamw import AdamW
from minilora.training.optimizers.adamw_8bit import AdamW8bit
from minilora.training.optimizers.clipping import clip_gradients, global_norm
from minilora.training.optimizers.lion import Lion
from minilora.training.optimizers.optimizer import Optimizer
from minilora.training.optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "SGD", "Adafactor", "AdamW", "AdamW8bit", "Lion", "Optimizer", "clip_gradients", "global_norm"]

OPTIMIZERS = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "adafactor": Adafactor, "lion": Lion, "sgd": SGD}
