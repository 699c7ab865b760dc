"""The code runs on a GPU, shown without one: it never mixes arrays of the host with arrays of the device.

`Device` stands for a GPU. Its arrays do not know NumPy: an operation between one of them and a NumPy array raises
TypeError, and so does a NumPy function called on one, as it would with CuPy. They enter by `to_device` and leave by
`to_host`, and every other way is closed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.strategies import TINY, random_adapter, random_weights

from minilora import backend
from minilora.backend import narrow, random_generator, read_only, to_device, to_host, widen, xp
from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import forward
from minilora.training.loss_scale import scaled_loss_and_gradients
from minilora.training.optimizers import OPTIMIZERS, clip_gradients, global_norm
from minilora.training.step import loss_and_gradients, mean_loss


class DeviceArray:
    """An array that only the device's own functions, methods and operators can touch."""

    __array_ufunc__ = None  # NumPy's operators and ufuncs refuse it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: Any) -> None:
        self.held = held

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a NumPy function was called on a device array: use xp, or to_host")

    def get(self) -> np.ndarray:
        return np.array(self.held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy's other ways in, such as __array_interface__
            raise AttributeError(name)
        attribute = getattr(self.held, name)
        return on_device(attribute) if callable(attribute) else wrap(attribute)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[unwrap(index)] = unwrap(value)

    def __iter__(self) -> Iterator[Any]:
        return map(wrap, self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)


def wrap(value: Any) -> Any:
    """What a function of the device returns. Reductions give arrays without dimensions, as CuPy's do."""
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value))
    return type(value)(map(wrap, value)) if isinstance(value, tuple | list) else value


def unwrap(value: Any) -> Any:
    """What a function of the device is given: device arrays and Python's numbers."""
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array was given to the device: use to_device")
    if isinstance(value, DeviceArray):
        return value.held
    return type(value)(map(unwrap, value)) if type(value) in (tuple, list) else value


def on_device(function: Any) -> Any:
    """The same function, of device arrays."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(function(*map(unwrap, args), **{name: unwrap(value) for name, value in kwargs.items()}))

    return wrapped


def operation(name: str) -> Any:
    def apply(self: DeviceArray, *others: Any) -> Any:
        result = getattr(self.held, name)(*map(unwrap, others))
        if name.startswith("__i") and name not in ("__invert__", "__index__"):
            self.held = result
            return self
        return result if result is NotImplemented else wrap(result)

    return apply


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OPERATORS = [f"__{kind}{name}__" for name in BINARY for kind in ("", "r", "i")]
OPERATORS += [
    f"__{name}__" for name in ("neg", "invert", "abs", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "index")
]
for operator_name in OPERATORS:
    setattr(DeviceArray, operator_name, operation(operator_name))


class Namespace:
    """A module of the device, such as `random`, or a ufunc with its methods, such as `add.at`."""

    def __init__(self, numpy: Any) -> None:
        self.numpy = numpy

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.numpy, name)
        if isinstance(attribute, type):  # a dtype
            return attribute
        if name == "default_rng":
            return lambda seed: Namespace(attribute(seed))
        return Namespace(attribute) if callable(attribute) or name == "random" else attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return on_device(self.numpy)(*args, **kwargs)


class Device(Namespace):
    """The array module. `asarray` is its one door: it takes NumPy arrays."""

    def __init__(self) -> None:
        super().__init__(np)

    def asarray(self, array: Any, dtype: Any = None) -> DeviceArray:
        return array if isinstance(array, DeviceArray) else DeviceArray(np.array(array, dtype))


@pytest.fixture
def device() -> Iterator[None]:
    previous = backend.use_module(Device())
    yield
    backend.use_module(previous)


BATCHES = [
    collate(
        [[Example([1, 2, 3, 4], [False, True, True, True]), Example([5, 6], [True, True])], [Example([7], [True])]], 0
    ),
    collate([[Example([3, 2, 1], [False, False, True])]], 0, left=True),
]
UNTIED = Config(**{**vars(TINY), "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True})


# --- The stand-in is as strict as it says ---


def add_in_place(a: Any, b: Any) -> None:
    a += b


def test_a_host_array_and_a_device_array_do_not_mix(device: None) -> None:
    here: Any = np.ones((2, 2))
    there: Any = to_device(here)
    mixtures: list[Callable[[], Any]] = [
        lambda: here + there,
        lambda: there + here,
        lambda: here @ there,
        lambda: there @ here,
        lambda: add_in_place(there, here),
        lambda: add_in_place(here, there),
        lambda: there[np.array([0])],
        lambda: there.__setitem__(0, here[0]),
        lambda: there.reshape(-1).sum(where=here),
        lambda: np.exp(there),
        lambda: np.concatenate([there, there]),
        lambda: np.asarray(there),
        lambda: xp.exp(here),
        lambda: xp.concatenate([there, here]),
        lambda: xp.zeros_like(here),
    ]
    for mixture in mixtures:
        with pytest.raises(TypeError):
            mixture()
    assert to_host(xp.exp(there * 2 + there @ there)).tolist() == np.exp(here * 2 + here @ here).tolist()


# --- Everything runs on it, and computes what the host computes ---


def trained_steps(config: Config, adapter: LoRA | None, frozen: str, optimizer: str) -> dict[str, np.ndarray]:
    """Two whole steps of training, and what is trained after them; the loss beside it."""
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_weights(config, 0).items()}
    if adapter is None:
        trainable = {name: to_device(array.astype(np.float64)) for name, array in weights.items()}
        model = full_model(config, trainable)
    else:
        base = base_model(config, weights, np.float64, frozen)
        fresh = adapter.start(base, np.random.default_rng(0), np.float64)
        start = random_adapter({name: to_host(array) for name, array in fresh.items()}, 1)
        trainable = {name: to_device(array.copy()) for name, array in start.items()}
        model = adapter.attach(base, trainable)
    update = OPTIMIZERS[optimizer](trainable, weight_decay=0.1)
    for step in range(2):
        loss, gradients = loss_and_gradients(model, BATCHES, None, checkpointing=step > 0)
        clip_gradients(gradients, global_norm(gradients), 0.5)
        update.update(trainable, gradients, 0.01)
    state = {name: to_host(array) for name, array in {**trainable, **update.state()}.items()}
    return {**state, "loss": np.array(loss), "mean": np.array(mean_loss(model, BATCHES))}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("adapter", "frozen"),
    [
        (None, ""),
        (LoRA(4, target_modules=("all-linear",)), "stored"),
        (LoRA(4, target_modules=("all-linear",)), "nf4"),
        (LoRA(4, target_modules=("all-linear",)), "offloaded"),
    ],
    ids=["full", "lora", "qlora", "lora with offloading"],
)
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_training_on_a_device_never_mixes_arrays_and_computes_what_the_host_computes(
    config: Config, adapter: LoRA | None, frozen: str, optimizer: str, request: pytest.FixtureRequest
) -> None:
    on_host = trained_steps(config, adapter, frozen, optimizer)
    request.getfixturevalue("device")
    on_the_device = trained_steps(config, adapter, frozen, optimizer)
    assert on_host.keys() == on_the_device.keys()
    for name, array in on_host.items():
        np.testing.assert_array_equal(on_the_device[name], array, err_msg=name)


@pytest.mark.parametrize("frozen", ["stored", "nf4", "offloaded"])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_mixed_precision_on_a_device_never_mixes_arrays_and_computes_nearly_what_the_host_computes(
    half: str, frozen: str, request: pytest.FixtureRequest
) -> None:
    """Nearly: the device multiplies and adds in 16 bits by its own means."""

    def gradients() -> dict[str, np.ndarray]:
        base = base_model(UNTIED, random_weights(UNTIED, 0), np.float32, frozen, half)
        method = LoRA(4, target_modules=("all-linear",))
        fresh = method.start(base, np.random.default_rng(0))
        start = random_adapter({name: to_host(array) for name, array in fresh.items()}, 1)
        adapter = {name: to_device(array.astype(np.float32)) for name, array in start.items()}
        loss, found = scaled_loss_and_gradients(1024.0, method.attach(base, adapter), BATCHES)
        return {name: to_host(array) for name, array in found.items()} | {"loss": np.array(loss)}

    on_host = gradients()
    request.getfixturevalue("device")
    for name, array in gradients().items():
        assert abs(array - on_host[name]).max() < 0.1 * abs(on_host[name]).max(), name


def test_offloaded_matrices_stay_on_the_host_and_all_else_is_on_the_device(device: None) -> None:
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_weights(UNTIED, 0).items()}
    for site in base_model(UNTIED, weights, np.float32, "offloaded").sites.values():
        if hasattr(site, "gain"):
            assert isinstance(site.gain, DeviceArray)
        else:
            assert isinstance(site.weight.W, np.ndarray) and site.weight.W.dtype == np.uint16
            assert isinstance(site.weight.dense(), DeviceArray)


def test_dropout_and_initialisation_stay_on_the_device(device: None) -> None:
    settings = LoRA(4, dropout=0.5, target_modules=("all-linear",), init="gaussian")
    base = base_model(TINY, random_weights(TINY, 0))
    adapter = settings.start(base, np.random.default_rng(0))
    assert all(isinstance(array, DeviceArray) for array in adapter.values())
    _, gradients = loss_and_gradients(settings.attach(base, adapter), BATCHES, [1, 2])
    assert all(isinstance(gradient, DeviceArray) for gradient in gradients.values())


def test_going_on_from_past_keys_and_values_stays_on_the_device(device: None) -> None:
    model, past = base_model(TINY, random_weights(TINY, 0)), None
    tokens, _, positions, segments = Batch(*(to_device(array) for array in BATCHES[0]))
    for t in range(tokens.shape[1]):
        hidden, past, _ = forward(model, tokens[:, t : t + 1], positions[:, t : t + 1], segments[:, t : t + 1], past)
    assert isinstance(hidden, DeviceArray)


# --- The backend's own functions ---


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'nonsense' is unknown: choose auto, cpu or cuda"):
        backend.use("nonsense")


def test_without_cupy_cuda_says_what_to_install_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it now fails
    with pytest.raises(RuntimeError, match=r"pip install 'minilora\[cuda12\]'.*--device cpu"):
        backend.use("cuda")
    assert backend.use("auto") == "cpu"
    assert backend.use("cpu") == "cpu"
    assert xp.zeros is np.zeros


def test_on_the_host_nothing_is_copied_on_the_way_to_the_device_and_back() -> None:
    array = np.ones(3)
    assert to_device(array) is array
    assert to_host(array) is array
    assert widen(array, np.float64) is array


def test_a_read_only_array_refuses_every_write() -> None:
    array = read_only(np.ones(3))
    with pytest.raises(ValueError, match="read-only"):
        array += 1


def test_the_same_seeds_give_the_same_draws_and_each_of_several_seeds_counts() -> None:
    def draw(*seeds: int) -> bytes:
        return bytes(random_generator(*seeds).random(4).tobytes())

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1, 3), draw(0, 2), draw(1)}) == 5


def test_bfloat16_is_held_as_its_bits_and_widened_exactly() -> None:
    numbers = np.array([0.0, -0.0, 1.0, -1.5, 3.140625, 1e-40, 3.3895314e38, np.inf], ml_dtypes.bfloat16)
    assert narrow(numbers).dtype == np.uint16
    wide = widen(narrow(numbers), np.float32)
    assert wide.dtype == np.float32
    assert wide.tobytes() == numbers.astype(np.float32).tobytes()
