"""What the implementations in PyTorch share: arrays and tensors on the same memory, and gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray


class Layer(NamedTuple):
    """A layer of somebody's, and those of its parameters that train: A and B, and m if there is one."""

    module: nn.Module
    trained: list[nn.Parameter]


def weight(array: Array, trains: bool = False) -> nn.Parameter:
    """A parameter on the array's own memory: who writes to the one writes to the other."""
    return nn.Parameter(torch.from_numpy(array), requires_grad=trains)


def linear(W: Array, b: Array | None = None) -> nn.Linear:
    """PyTorch's own linear layer with this frozen weight and bias."""
    module = nn.Linear(1, 1, bias=False)
    module.in_features, module.out_features, module.weight = W.shape[1], W.shape[0], weight(W)
    module.bias = None if b is None else weight(b)  # type: ignore[assignment]
    return module


def computed(module: Callable[..., Tensor], *inputs: Array) -> Array:
    with torch.no_grad():
        return np.asarray(module(*map(torch.from_numpy, inputs)).numpy())


def gradients(
    module: Callable[..., Tensor], inputs: Sequence[Array], dy: Array, trained: Sequence[nn.Parameter] = ()
) -> tuple[Array, ...]:
    """Of L = Σ y ⊙ dy: for each input, then for each parameter."""
    tensors = [torch.from_numpy(x).requires_grad_(x.dtype.kind == "f") for x in inputs]
    variables = [*(x for x in tensors if x.requires_grad), *trained]
    found = torch.autograd.grad(module(*tensors), variables, torch.from_numpy(dy), materialize_grads=True)
    return tuple(gradient.numpy() for gradient in found)


# Each of these makes NAME_forward and NAME_gradients out of what builds the layer, or computes the operation.

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def linear_functions(layer: Callable[..., Layer]) -> tuple[Callable[..., Any], ...]:
    """lora_forward, lora_gradients and lora_step by `layer(W, A, B, scale)`."""

    def lora_step(
        x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
    ) -> tuple[Array, ...]:
        module, trained = layer(W, A, B, scale)
        optimizer = torch.optim.SGD(trained, lr=learning_rate)
        (0.5 * (module(torch.from_numpy(x)) - torch.from_numpy(target)).square().sum()).backward()
        optimizer.step()
        return tuple(parameter.detach().numpy() for parameter in trained)

    return (*layer_functions(layer), lora_step)


def layer_functions(layer: Callable[..., Layer]) -> Pair:
    """Of an input and `layer(*settings)`, as DoRA, an embedding or a norm has them."""

    def forward(x: Array, *settings: Any) -> Array:
        return computed(layer(*settings).module, x)

    def backward(x: Array, *settings_and_dy: Any) -> tuple[Array, ...]:
        *settings, dy = settings_and_dy
        module, trained = layer(*settings)
        return gradients(module, [x], dy, trained)

    return forward, backward


def dropout_functions(layer: Callable[..., Layer]) -> Pair:
    """By `layer(W, A, B, scale, p)`; the seed is set when the layer is there, since making it draws numbers, too."""

    def seeded(*settings_and_seed: Any) -> Layer:
        *settings, seed = settings_and_seed
        made = layer(*settings)
        torch.manual_seed(seed)
        return made

    return layer_functions(seeded)


def functions(operation: Callable[..., Tensor]) -> Pair:
    """Of an operation on tensors alone."""

    def forward(*inputs: Array) -> Array:
        return computed(operation, *inputs)

    def backward(*inputs_and_dy: Array) -> tuple[Array, ...]:
        *inputs, dy = inputs_and_dy
        return gradients(operation, inputs, dy)

    return forward, backward


def rope_functions(rope: Callable[[Array, float, Tensor], Tensor]) -> Pair:
    def rope_forward(x: Array, positions: Array, theta: float) -> Array:
        return computed(partial(rope, positions, theta), x)

    def rope_gradients(positions: Array, theta: float, dy: Array) -> Array:
        return gradients(partial(rope, positions, theta), [0 * dy], dy)[0]

    return rope_forward, rope_gradients


def cross_entropy_functions(loss: Callable[[Array, Tensor], Tensor]) -> Pair:
    """By the mean loss of labels and logits."""

    def cross_entropy_forward(logits: Array, labels: Array) -> float:
        return float(loss(labels, torch.from_numpy(logits)))

    def cross_entropy_gradients(logits: Array, labels: Array) -> Array:
        return gradients(partial(loss, labels), [logits], np.asarray(1, logits.dtype))[0]

    return cross_entropy_forward, cross_entropy_gradients


class Columns(nn.Module):
    """Takes the place of a projection: some of the columns of its input."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.columns = slice(first, last)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.columns]


def side_by_side(*parts: Tensor) -> Tensor:
    """(T, H, d), (T, K, d), … as one sequence of one batch, (1, T, (H + K + …) d)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)[None]


def in_order(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], p: Array, steps: Array) -> Array:
    """p after each step of the optimiser, the gradients being given."""
    parameter = weight(p, trains=True)
    running = optimizer([parameter])
    places = []
    for gradient in steps:
        parameter.grad = torch.from_numpy(gradient)
        running.step()
        places.append(parameter.detach().numpy().copy())
    return np.stack(places)
