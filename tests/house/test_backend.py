"""The code runs on a GPU, shown without one: it never mixes arrays of the host with arrays of the device.

`Device` stands for a GPU. Its arrays do not know NumPy: an operation between one of them and a NumPy array raises
TypeError, and so does a NumPy function called on one, as it would with CuPy. They enter by `to_device` and leave by
`to_host`, and every other way is closed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.device import BATCHES, UNTIED, Device, DeviceArray
from support.halves import stored
from support.strategies import QV, TINY, VOCAB, normal, random_adapter, random_weights
from support.threads_as_ranks import on_threads
from support.virtual_tokens import VirtualTokens, base, each_method

from minilora import backend
from minilora.adapters.change import changed_model, changes
from minilora.adapters.mixed import continuing, mixed
from minilora.adapters.scaling import scaled
from minilora.backend import narrow, random_generator, read_only, to_device, to_host, widen, xp
from minilora.data.batches import Batch
from minilora.frozen.half import HALVES
from minilora.frozen.weight import DenseWeight
from minilora.methods.dora import DoRA
from minilora.methods.full import Full, full_model
from minilora.methods.lora import LoRA
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.decoding import Decoder
from minilora.model.generation import complete, read
from minilora.model.model import forward
from minilora.model.names import HEAD
from minilora.model.rows import join, keep
from minilora.model.sites import add_gradients
from minilora.runs.evaluation import losses_of_tokens
from minilora.training.loss_scale import scaled_loss_and_gradients
from minilora.training.message import Sum
from minilora.training.optimizers import OPTIMIZERS, clip_gradients, global_norm
from minilora.training.ranks import Ranks
from minilora.training.step import loss_and_gradients, mean_loss

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
        (LoRA(4, target_modules=("all-linear",)), "mapped"),
    ],
    ids=["full", "lora", "qlora", "lora with offloading", "lora on a mapped base"],
)
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_training_on_a_device_never_mixes_arrays_and_computes_what_the_host_computes(
    config: Config,
    adapter: LoRA | None,
    frozen: str,
    optimizer: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minilora.training.parts.cores", lambda: 1)  # several would add up the mean in another order
    on_host = trained_steps(config, adapter, frozen, optimizer)
    request.getfixturevalue("device")
    on_the_device = trained_steps(config, adapter, frozen, optimizer)
    assert on_host.keys() == on_the_device.keys()
    for name, array in on_host.items():
        np.testing.assert_allclose(on_the_device[name], array, rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("frozen", ["stored", "nf4", "offloaded", "mapped"])
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


@each_method
def test_on_a_device_nothing_mixes_with_the_host_and_the_same_comes_out(
    method: type[VirtualTokens], request: pytest.FixtureRequest
) -> None:
    def started() -> tuple[float, np.ndarray, list[list[int]]]:
        plain, virtual = base(TINY, 0), method(3, (1, 2))
        tuned_model = virtual.attach(plain, virtual.start(plain, np.random.default_rng(0), np.float64))
        loss, gradients = loss_and_gradients(tuned_model, BATCHES)
        return loss, to_host(gradients[EMBEDDINGS]), complete(tuned_model, [[1, 2, 3], [4]], 4, frozenset())

    loss, gradient, answers = started()
    request.getfixturevalue("device")
    loss_there, gradient_there, answers_there = started()
    assert loss_there == pytest.approx(loss, rel=1e-12) and answers_there == answers
    np.testing.assert_allclose(gradient_there, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", [LoRA(2, target_modules=("q_proj", "embed_tokens")), DoRA(2), Full()])
def test_a_change_that_was_found_on_the_device_is_put_back_there(
    method: LoRA | Full, request: pytest.FixtureRequest
) -> None:
    def less() -> tuple[list[float], np.ndarray]:
        plain = base(TINY, 0)
        trainable = method.start(plain, np.random.default_rng(0), np.float64)
        for p in trainable.values():
            p += 0.25
        adapted = method.attach(plain, trainable)
        found = changes(plain, adapted, method, {name: to_host(p) for name, p in trainable.items()})
        half = changed_model(plain, adapted, found, rank=1, scale=0.5)
        return [change.norm for change in found.values()], losses_of_tokens(half, BATCHES[0])

    norms, losses = less()
    request.getfixturevalue("device")
    norms_there, losses_there = less()
    np.testing.assert_allclose(norms_there, norms, rtol=1e-12)
    np.testing.assert_allclose(losses_there, losses, rtol=1e-9)


def test_a_mixed_batch_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, dora = LoRA(4, 8.0, target_modules=QV), DoRA(2, 4.0, target_modules=("v_proj", "down_proj"))

    def logits(batch: Sequence[int]) -> np.ndarray:
        base = base_model(TINY, random_weights(TINY, 0))
        fresh = dora.start(base, np.random.default_rng(0)), lora.start(base, np.random.default_rng(0))
        models = [base, *(method.attach(base, each) for method, each in zip((dora, lora), fresh, strict=True))]
        tokens = np.arange(3 * len(batch)).reshape(-1, 3) % VOCAB
        positions, ones = np.broadcast_to(np.arange(3), tokens.shape), np.ones_like(tokens)
        model = mixed([models[i] for i in batch])
        hidden = forward(model, *map(to_device, (tokens, positions, ones)), keep=False)[0]
        return to_host(model.sites[HEAD].forward(hidden)[0])

    on_host = logits([0, 2, 1, 2])
    monkeypatch.setattr(backend, "_module", Device())
    np.testing.assert_allclose(logits([0, 2, 1, 2]), on_host, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sum_of_ranks_is_made_on_the_device_and_travels_through_the_host(size: int, device: None) -> None:
    """With one device a rank; no two devices were at hand, so this stands in for them."""

    def part(number: int, seed: int | None) -> tuple[float, dict[str, Any]]:
        return number / 8, {"weight": to_device(np.full((2, 3), number, np.float32)).T, "bias": to_device(np.ones(2))}

    def summed(ranks: Ranks) -> tuple[float, dict[str, np.ndarray]]:
        total = Sum()
        for loss, new in ranks.relay(total, map, part, range(5), [None] * 5):
            total.loss += loss
            add_gradients(total.gradients, new)
        assert all(isinstance(g, DeviceArray) for g in total.gradients.values())
        return total.loss, {name: to_host(g) for name, g in total.gradients.items()}

    for loss, gradients in on_threads(size, summed) if size > 1 else [summed(Ranks())]:
        assert loss == 10 / 8
        np.testing.assert_array_equal(gradients["weight"], np.full((3, 2), 10, np.float32))
        np.testing.assert_array_equal(gradients["bias"], [5, 5])


def test_rows_that_come_and_go_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, dora = LoRA(4, 8.0, target_modules=QV), DoRA(2, 4.0, target_modules=("v_proj", "down_proj"))

    def logits() -> np.ndarray:
        base = base_model(TINY, random_weights(TINY, 0))
        models = [base]
        for method in (lora, dora):
            fresh = random_adapter(method.start(base, np.random.default_rng(0)), 0)
            model = method.attach(base, {name: to_device(to_host(value)) for name, value in fresh.items()})
            models += [model, scaled(model, base, 0.5)]
        pasts = [read(model, [1, 2, 3][: 1 + i % 3])[1] for i, model in enumerate(models)]
        decoder = Decoder(continuing(models), join(pasts))
        first = decoder.step(to_device(np.arange(5)), decoder.positions[:, -1] + 1)
        decoder = Decoder(continuing(models[1::3]), keep(decoder.past, [1, 4]))
        second = decoder.step(to_device(np.array([7, 8])), decoder.positions[:, -1] + 1)
        return np.concatenate([to_host(first), to_host(second)])

    on_host = logits()
    assert type(on_host) is np.ndarray and len(on_host) == 7
    monkeypatch.setattr(backend, "_module", Device())
    np.testing.assert_allclose(logits(), on_host, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("out", [64, 192, 256, 100, 300])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 32, 33])
def test_however_many_rows_go_in_however_large_pieces_the_product_is_the_same(
    n: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W with slices of 128 rows, and pieces of 64 within them."""
    monkeypatch.setattr("minilora.backend.SLICE", 150 * 8)
    W, x = normal(0, out, 8), normal(1, n, 8)
    weight = stored("bfloat16", W, np.float64)
    assert [rows.stop - rows.start for rows in weight.slices] == [128] * math.ceil(out / 128)
    y = weight.forward(x)
    np.testing.assert_allclose(y, x @ W.astype(ml_dtypes.bfloat16).astype(np.float64).T, atol=1e-12)
    assert y.flags.c_contiguous
    np.testing.assert_allclose(DenseWeight(W).forward(x), x @ W.T, atol=1e-12)


def test_an_array_module_without_bfloat16_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.frozen.hold.supports", lambda dtype: False)
    with pytest.raises(RuntimeError, match=r"this CuPy has no bf16: install CuPy 14 with CUDA 12\.2, or later"):
        base_model(TINY, random_weights(TINY, 0), np.float32, "stored", "bf16")


def test_a_dtype_is_supported_if_the_module_can_multiply_matrices_of_it() -> None:
    class Old:
        """It makes such arrays, and cannot multiply them."""

        class ones(np.ndarray):
            def __new__(cls, shape: tuple[int, int], dtype: Any) -> Any:
                return np.ones(shape, dtype).view(cls)

            def __matmul__(self, other: Any) -> Any:
                raise RuntimeError("no kernel for these")

    assert all(backend.supports(half) for half in HALVES.values())
    previous = backend.use_module(Old())
    try:
        assert not backend.supports(ml_dtypes.bfloat16)
    finally:
        backend.use_module(previous)
