"""Training: optimisers, schedules and order are what the books say; a run is reproducible and outlives being killed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.strategies import TINY, VOCAB, normal, random_weights, seeds

from minilora.data.batches import Rows, batches_of, count_labels, pack
from minilora.data.examples import Example
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.runs import folder as folder_module
from minilora.runs import state_file as state_module
from minilora.runs.folder import train_in
from minilora.runs.metrics import METRICS_FILE, MetricsFile, read_metrics
from minilora.runs.state_file import STATE_FILE, load_state
from minilora.training import loop
from minilora.training.loop import Diverged, Plan, next_batches, steps_per_epoch
from minilora.training.optimizers import OPTIMIZERS, SGD, AdamW, clip_gradients, global_norm
from minilora.training.order import Order
from minilora.training.schedules import SCHEDULES, learning_rate, warmup_steps
from minilora.training.state import State
from minilora.training.step import loss_and_gradients, mean_loss

few = settings(max_examples=25)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    """Hundreds of them would bury what a failing test has to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tqdm", partial(loop.tqdm, disable=True))
        yield


SHAPES = {"matrix": (3, 2), "gain": (4,)}  # decay acts on the first only
rates = st.floats(1e-4, 0.1)


# --- optimisers ---


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape, stream=i) for i, (name, shape) in enumerate(SHAPES.items())}


@given(seed=seeds, rate=rates, decay=st.floats(0, 1), steps=st.integers(1, 8))
def test_adamw_follows_its_textbook_recurrence(seed: int, rate: float, decay: float, steps: int) -> None:
    parameters, gradients = arrays(seed), [arrays(seed + t) for t in range(1, steps + 1)]
    expected = {}
    for name, p in parameters.items():  # Loshchilov & Hutter, algorithm 2, line by line
        m, v, weight_decay = 0, 0, decay if p.ndim == 2 else 0
        for t, g in enumerate((gradient[name] for gradient in gradients), start=1):
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            p = p - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + weight_decay * p)
        expected[name] = p
    optimizer = AdamW(parameters, decay)
    for gradient in gradients:
        optimizer.update(parameters, gradient, rate)
    for name in parameters:
        np.testing.assert_allclose(parameters[name], expected[name], rtol=1e-10, atol=1e-12)


@settings(max_examples=5)
@given(seed=seeds, rate=rates, decay=st.floats(0, 1))
def test_adamw_walks_where_pytorchs_walks(seed: int, rate: float, decay: float) -> None:
    torch = pytest.importorskip("torch")
    parameters = arrays(seed)
    peers = {name: torch.tensor(p, requires_grad=True) for name, p in parameters.items()}
    groups = [{"params": [p], "weight_decay": decay if p.ndim == 2 else 0.0} for p in peers.values()]
    ours, theirs = AdamW(parameters, decay), torch.optim.AdamW(groups, rate, foreach=False)
    for t in range(60):
        gradients = arrays(seed + t)
        for name, p in peers.items():
            p.grad = torch.tensor(gradients[name])
        for group in theirs.param_groups:
            group["lr"] = rate * (1 - t / 60)
        theirs.step()
        ours.update(parameters, gradients, rate * (1 - t / 60))
    for name in parameters:
        np.testing.assert_allclose(parameters[name], peers[name].detach().numpy(), rtol=1e-10, atol=1e-10)


@given(seed=seeds, rate=rates)
def test_adamws_first_step_has_the_length_of_the_rate_whatever_the_gradients_scale(seed: int, rate: float) -> None:
    for scale in (1.0, 1e6):
        p = {"p": np.zeros(3)}
        AdamW(p).update(p, {"p": scale * np.array([1.0, -2.0, 3.0])}, rate)
        np.testing.assert_allclose(p["p"], rate * np.array([-1, 1, -1]), rtol=1e-6)


@given(seed=seeds, rate=rates, decay=st.floats(0, 1))
def test_sgd_walks_down_the_gradient(seed: int, rate: float, decay: float) -> None:
    parameters, before, gradients = arrays(seed), arrays(seed), arrays(seed + 1)
    SGD(parameters, decay).update(parameters, gradients, rate)
    for name, p in before.items():
        expected = p - rate * (gradients[name] + (decay if name == "matrix" else 0) * p)
        np.testing.assert_allclose(parameters[name], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_matrices_and_leaves_vectors_alone(name: str) -> None:
    parameters, before = arrays(0), arrays(0)
    nothing = {key: np.zeros_like(p) for key, p in parameters.items()}
    OPTIMIZERS[name](parameters, 0.5).update(parameters, nothing, 0.1)
    np.testing.assert_allclose(parameters["matrix"], before["matrix"] * (1 - 0.1 * 0.5), rtol=1e-15)
    assert np.array_equal(parameters["gain"], before["gain"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_writes_into_the_arrays_that_the_model_shares_and_keeps_their_dtype(name: str) -> None:
    parameters = {key: p.astype(np.float32) for key, p in arrays(0).items()}
    shared = dict(parameters)
    optimizer = OPTIMIZERS[name](parameters, 0.1)
    optimizer.update(parameters, {key: p.astype(np.float32) for key, p in arrays(1).items()}, 0.1)
    assert all(parameters[key] is shared[key] and shared[key].dtype == np.float32 for key in shared)
    assert {a.dtype.name for a in optimizer.state().values()} <= {"float32", "int64"}


@given(seed=seeds, limit=st.just(0.0) | st.floats(1e-3, 10))
def test_clipping_keeps_the_direction_and_caps_the_norm(seed: int, limit: float) -> None:
    before, after = arrays(seed), arrays(seed)
    norm = global_norm(after)
    assert math.isclose(norm, math.sqrt(sum(float(x) ** 2 for g in before.values() for x in g.ravel())))
    clip_gradients(after, norm, limit)
    if limit == 0 or norm <= limit:
        assert all(np.array_equal(before[name], after[name]) for name in before)
    else:
        assert math.isclose(global_norm(after), limit)
        for name in before:
            np.testing.assert_allclose(after[name] * norm, before[name] * limit, rtol=1e-12)


# --- schedules ---


@given(
    schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 200), share=st.floats(0, 0.99), peak=st.floats(1e-6, 1)
)
@example(schedule="cosine", steps=1, share=0.0, peak=1.0)
def test_rates_climb_evenly_to_the_peak_and_then_never_rise_nor_reach_zero(
    schedule: str, steps: int, share: float, peak: float
) -> None:
    warmup = int(share * steps)
    found = [learning_rate(step, steps, peak, schedule, warmup) for step in range(steps)]
    np.testing.assert_allclose(found[:warmup], [peak * (k + 1) / (warmup + 1) for k in range(warmup)])
    assert found[warmup] == peak
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[warmup:]))
    assert 0 < min(found)


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, (1 - math.cos(math.pi / 10)) / 2)],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_have_these_values_at_their_corners(schedule: str, halfway: float, last: float, warmup: int) -> None:
    def share(step: int) -> float:
        return learning_rate(step, warmup + 10, 2.0, schedule, warmup) / 2.0

    assert share(0) == (0.2 if warmup else 1.0)
    assert share(warmup) == 1.0
    assert math.isclose(share(warmup + 5), halfway)
    assert math.isclose(share(warmup + 9), last)


def test_an_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'step' is unknown: choose cosine, linear, constant"):
        learning_rate(3, 10, 1.0, "step")


def test_warmup_below_one_is_a_share_and_from_one_on_a_number_of_steps() -> None:
    assert [warmup_steps(warmup, 200) for warmup in (0, 0.03, 0.5, 1, 20, 500)] == [0, 6, 100, 1, 20, 500]


# --- the order of the rows ---


@given(count=st.integers(1, 20), size=st.integers(1, 25), seed=seeds)
def test_each_epoch_deals_every_row_once_and_its_last_part_may_be_smaller(count: int, size: int, seed: int) -> None:
    order, rng = Order(count), np.random.default_rng(seed)
    takes = math.ceil(count / size)
    for epoch in (1, 2, 3):
        dealt = [order.take(size, rng) for _ in range(takes)]
        assert sorted(itertools.chain(*dealt)) == list(range(count))
        assert [len(part) for part in dealt] == [size] * (takes - 1) + [count - size * (takes - 1)]
        assert order.epoch == epoch


@given(count=st.integers(10, 30), seed=seeds)
def test_epochs_differ_in_order_and_the_seed_decides_it(count: int, seed: int) -> None:
    def epochs(seed: int) -> list[list[int]]:
        order, rng = Order(count), np.random.default_rng(seed)
        return [order.take(count, rng) for _ in range(2)]

    assert epochs(seed) == epochs(seed) != epochs(seed + 1)
    assert epochs(seed)[0] != epochs(seed)[1]


# --- runs of the loop ---


def make_rows(count: int, seed: int) -> list[list[Example]]:
    """Rows of different lengths, the first half of each a prompt that is not trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 8, count)
    return [[Example(rng.integers(0, VOCAB, n).tolist(), [t >= n // 2 for t in range(n)])] for n in lengths]


ROWS, VALID = make_rows(9, seed=1), batches_of(make_rows(4, seed=2), 2, pad_id=0)
PLAN = Plan(steps=8, batch_size=2, grad_accumulation=2, learning_rate=0.05, warmup=2, eval_every=2, save_every=3)


def new_run(
    rows: Rows = ROWS, method: str = "lora", dropout: float = 0.0, optimizer: str = "adamw", seed: int = 0
) -> tuple[Model, State]:
    """The same tiny model each time; the seed decides the adapter, the order and the dropout."""
    rng = np.random.default_rng(seed)
    trainable = random_weights(TINY, seed=0)
    model = full_model(TINY, trainable)
    if method == "lora":
        base = base_model(TINY, trainable, np.float64)
        lora = LoRA(2, 4.0, dropout, target_modules=("all-linear",))
        trainable = lora.start(base, rng, np.float64)
        model = lora.attach(base, trainable)
    return model, State(trainable, OPTIMIZERS[optimizer](trainable, 0.01), Order(len(rows)), rng, data="rows")


def trained(folder: Path, plan: Plan = PLAN, rows: Rows = ROWS, **options: Any) -> State:
    """Train, going on from what an earlier call has left in the folder."""
    model, state = new_run(rows, **options)
    if (folder / STATE_FILE).exists():
        load_state(state, folder)
    train_in(folder, model, state, rows, VALID, plan)
    return state


def parameter_bytes(state: State) -> dict[str, bytes]:
    return {name: p.tobytes() for name, p in state.trainable.items()}


def outcome(state: State, folder: Path) -> dict[str, Any]:
    """All that a run leaves, to the last bit, except for how long it took."""
    numbers = {name: getattr(state, name) for name in state_module.NUMBERS if name != "seconds"}
    saved = {name: a.tobytes() for name, a in load_file(folder / STATE_FILE).items()}
    metrics = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)]
    rng = state.rng.bit_generator.state
    return parameter_bytes(state) | {"numbers": numbers, "saved": saved, "metrics": metrics, "rng": rng}


methods = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["lora", "lora", "full"]),
        "dropout": st.sampled_from([0.0, 0.3]),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "seed": st.integers(0, 5),
    }
)


@settings(max_examples=12)
@given(options=methods)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(options: dict[str, Any]) -> None:
    with TemporaryDirectory() as a, TemporaryDirectory() as b, TemporaryDirectory() as c:
        first, again = trained(Path(a), **options), trained(Path(b), **options)
        assert outcome(first, Path(a)) == outcome(again, Path(b))
        other = trained(Path(c), **(options | {"seed": 99}))
        assert parameter_bytes(first) != parameter_bytes(other)


class Killed(BaseException):
    """The process ends here."""


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until its process is killed at the start of one of its calls."""
    calls = itertools.count(1)

    def dying(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*args, **options)

    return dying


PLACES = {
    "before the gradients": (loop, "loss_and_gradients"),
    "before the update": (loop, "clip_gradients"),
    "after the update": (MetricsFile, "write"),
    "before validation": (loop, "mean_loss"),
    "before saving": (folder_module, "save_state"),
    "while saving": (state_module, "write_safetensors"),
}
plans = st.builds(
    replace,
    st.just(PLAN),
    eval_every=st.integers(0, 3),
    patience=st.integers(0, 2),
    save_every=st.integers(0, 4),
    activation_checkpointing=st.booleans(),
)


@settings(max_examples=40)
@given(
    plan=plans,
    options=methods,
    kills=st.lists(st.tuples(st.sampled_from(sorted(PLACES)), st.integers(1, 10)), min_size=1, max_size=3),
)
def test_killed_anywhere_and_resumed_equals_uninterrupted_to_the_last_bit(
    plan: Plan, options: dict[str, Any], kills: list[tuple[str, int]]
) -> None:
    with TemporaryDirectory() as whole, TemporaryDirectory() as cut:
        expected = outcome(trained(Path(whole), plan, **options), Path(whole))
        for place, call in kills:
            module, name = PLACES[place]
            with pytest.MonkeyPatch.context() as patch, suppress(Killed):
                patch.setattr(module, name, killed_at(call, getattr(module, name)))
                trained(Path(cut), plan, **options)
            with (Path(cut) / METRICS_FILE).open("a") as file:
                file.write('{"step": 3, "lo')
        assert outcome(trained(Path(cut), plan, **options), Path(cut)) == expected


@few
@given(save_every=st.integers(1, 4), data=st.data())
def test_every_saved_state_leads_to_the_same_end(save_every: int, data: st.DataObject) -> None:
    plan = replace(PLAN, save_every=save_every)
    saved: list[bytes] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, state = new_run(dropout=0.3)
        train_in(folder, model, state, ROWS, VALID, plan, 0, lambda _: saved.append((folder / STATE_FILE).read_bytes()))
        assert len(saved) == 1 + plan.steps // save_every + 1  # at the start, in between, at the end
        expected = outcome(state, folder)
        (folder / STATE_FILE).write_bytes(data.draw(st.sampled_from(saved), label="one of the saved states"))
        assert outcome(trained(folder, plan, dropout=0.3), folder) == expected


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        load_state(new_run()[1], tmp_path)
    trained(tmp_path)
    _, other = new_run()
    other.data = "other rows"
    with pytest.raises(ValueError, match="the data has changed"):
        load_state(other, tmp_path)
    with pytest.raises(ValueError, match="the data has changed"):
        load_state(new_run(ROWS[1:])[1], tmp_path)
    with pytest.raises(ValueError, match=r"trainable\.model\.embed_tokens\.weight is missing or has another shape"):
        load_state(new_run(method="full")[1], tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_trains_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    for name, checkpointing in (("a", False), ("b", True)):
        plan = replace(PLAN, activation_checkpointing=checkpointing)
        trained(tmp_path / name, plan, method=method, dropout=0.3)
    assert load_file(tmp_path / "a" / STATE_FILE).keys() == load_file(tmp_path / "b" / STATE_FILE).keys()
    for name, array in load_file(tmp_path / "a" / STATE_FILE).items():
        assert array.tobytes() == load_file(tmp_path / "b" / STATE_FILE)[name].tobytes()


DESCENT = replace(PLAN, learning_rate=0.5, eval_every=0)  # by SGD: Adam would make ±rate of a rounding error


@pytest.mark.parametrize(("batch_size", "grad_accumulation"), [(1, 6), (2, 3), (3, 2)])
def test_accumulated_micro_batches_train_as_one_batch_in_every_epoch(
    tmp_path: Path, batch_size: int, grad_accumulation: int
) -> None:
    whole = trained(tmp_path / "whole", replace(DESCENT, batch_size=6, grad_accumulation=1), optimizer="sgd")
    plan = replace(DESCENT, batch_size=batch_size, grad_accumulation=grad_accumulation)
    micro = trained(tmp_path / "micro", plan, optimizer="sgd")
    assert whole.order.epoch == 4
    for name, p in whole.trainable.items():
        np.testing.assert_allclose(micro.trainable[name], p, rtol=1e-7, atol=1e-9)


@settings(max_examples=10)
@given(seed=seeds)
def test_every_micro_batch_has_a_dropout_of_its_own_which_the_seed_decides(seed: int) -> None:
    def drawn(seed: int) -> list[int]:
        found: list[int] = []

        def recording(model: Model, batches: Any, micro_seeds: list[int], *_: Any, **__: Any) -> Any:
            found.extend(micro_seeds)
            return 1.0, {name: np.zeros_like(p) for name, p in state.trainable.items()}

        model, state = new_run(seed=seed)
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "loss_and_gradients", recording)
            train_in(Path(folder), model, state, ROWS, [], PLAN)
        return found

    first = drawn(seed)
    assert len(first) == len(set(first)) == 14  # 9 rows make 2 + 2 + 1 micro-batches an epoch
    assert not set(first) & set(drawn(seed + 1))


def test_accumulation_weighs_each_token_alike_which_an_average_of_averages_does_not() -> None:
    model, _ = new_run()
    short, long = Example([1, 2, 3], [False, False, True]), Example([4, 5, 6, 7], [False, True, True, True])
    micro = batches_of([[short], [long]], 1, pad_id=0)
    one, three = (mean_loss(model, [batch]) for batch in micro)
    loss, _ = loss_and_gradients(model, micro)
    assert math.isclose(loss, (1 * one + 3 * three) / 4)
    assert not math.isclose(loss, (one + three) / 2, rel_tol=1e-3)


def test_packed_rows_train_as_padded_rows_do(tmp_path: Path) -> None:
    examples = [row[0] for row in ROWS]
    packed = [[examples[i] for i in row] for row in pack(examples, 12)]
    assert len(packed) < len(ROWS)
    plan = replace(DESCENT, batch_size=len(ROWS), grad_accumulation=1)  # each step is an epoch: the same rows in both
    on_packed = trained(tmp_path / "packed", plan, packed, optimizer="sgd")
    on_padded = trained(tmp_path / "padded", plan, optimizer="sgd")
    assert on_packed.tokens == on_padded.tokens == plan.steps * sum(len(example.tokens) for example in examples)
    for name, p in on_padded.trainable.items():
        np.testing.assert_allclose(on_packed.trainable[name], p, rtol=1e-7, atol=1e-9)


@given(count=st.integers(1, 12), batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), seed=seeds)
def test_an_epochs_micro_batches_hold_every_row_once(count: int, batch_size: int, accumulation: int, seed: int) -> None:
    rows = make_rows(count, seed)
    _, state = new_run(rows, seed=seed)
    plan = replace(PLAN, batch_size=batch_size, grad_accumulation=accumulation)
    steps = [next_batches(state, rows, plan, 0) for _ in range(steps_per_epoch(rows, batch_size, accumulation))]
    assert state.order.epoch == 1 and state.order.cursor == count
    assert all(1 <= len(batches) <= accumulation for batches in steps)
    assert all(len(batch.tokens) <= batch_size for batches in steps for batch in batches)
    dealt = itertools.chain(*(zip(batch.tokens, batch.segments, strict=True) for batch in itertools.chain(*steps)))
    found = [tokens[segments > 0].tolist() for tokens, segments in dealt]
    assert sorted(found) == sorted(row[0].tokens for row in rows)


def test_training_lowers_the_loss_and_changes_no_byte_of_what_is_frozen(tmp_path: Path) -> None:
    model, state = new_run()
    weights = random_weights(TINY, seed=0)
    batches = batches_of(ROWS, 4, pad_id=0)
    start = mean_loss(model, batches)
    train_in(tmp_path, model, state, ROWS, [], replace(PLAN, steps=30))
    assert mean_loss(model, batches) < 0.8 * start
    for name, site in model.sites.items():
        frozen = getattr(site, "base", site)  # of an adapted site, what stands beneath the adapter
        found = frozen.gain if hasattr(frozen, "gain") else frozen.weight.dense()
        expected = weights["model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight"]
        assert found.tobytes() == expected.tobytes()


# --- validation, the best, and patience ---


@settings(max_examples=50)
@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan]), min_size=1, max_size=8),
    patience=st.integers(0, 3),
)
def test_training_stops_after_patience_without_gain_and_ends_as_at_the_best_validation(
    losses: list[float], patience: int
) -> None:
    at_validation: list[dict[str, bytes]] = []

    def scripted(model: Model, batches: Any) -> float:
        if batches is not VALID:
            return 1.0  # asked before a saving: is the loss still finite?
        at_validation.append(parameter_bytes(state))
        return losses[len(at_validation) - 1]

    best, best_loss, expected = -1, math.inf, len(losses)
    for i, loss in enumerate(losses):
        if loss < best_loss:
            best, best_loss = i, loss
        if patience and i - best >= patience:
            expected = i + 1
            break
    model, state = new_run()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "mean_loss", scripted)
        plan = replace(PLAN, steps=len(losses), eval_every=1, patience=patience, save_every=0)
        train_in(Path(folder), model, state, ROWS, VALID, plan)
    assert state.step == len(at_validation) == expected
    assert (state.best_loss, state.best_step) == (best_loss, best + 1)
    assert parameter_bytes(state) == at_validation[best]  # the last ones if no loss was ever a number


@pytest.mark.parametrize(("eval_every", "expected"), [(0, []), (3, [3, 6, 8]), (4, [4, 8]), (20, [8])])
def test_validation_comes_every_so_many_steps_and_at_the_end(
    tmp_path: Path, eval_every: int, expected: list[int]
) -> None:
    trained(tmp_path, replace(PLAN, eval_every=eval_every))
    assert [line["step"] for line in read_metrics(tmp_path) if "valid_loss" in line] == expected


# --- metrics ---


def test_metrics_hold_one_line_for_each_step_with_what_happened_in_it(tmp_path: Path) -> None:
    state = trained(tmp_path)
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, PLAN.steps + 1))
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3]  # 9 rows, 4 a step
    assert [line["learning_rate"] for line in lines] == [learning_rate(k, 8, 0.05, "cosine", 2) for k in range(8)]
    assert sum(line["tokens"] for line in lines) == state.tokens
    an_epoch = sum(count_labels(batch) for batch in batches_of(ROWS, 1, pad_id=0))
    assert sum(line["labelled_tokens"] for line in lines[:3]) == an_epoch
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_on_resuming_lines_of_steps_to_be_run_again_are_dropped_and_a_torn_last_line_too(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / METRICS_FILE).write_text(whole + '{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    metrics = MetricsFile(tmp_path, step=2)
    metrics.write(step=3, loss=0.25)
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


# --- divergence ---


@pytest.mark.parametrize("sick", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_training_and_the_last_saved_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sick: str
) -> None:
    model, state = new_run()
    saved: list[bytes] = []
    calls = itertools.count(1)

    def sickening(*args: Any, **options: Any) -> Any:
        loss, gradients = loss_and_gradients(*args, **options)
        if next(calls) == 6:
            if sick == "loss":
                return math.inf, gradients
            gradients["model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = math.nan
        return loss, gradients

    monkeypatch.setattr(loop, "loss_and_gradients", sickening)
    with pytest.raises(Diverged, match=r"^step 6: .* keeps the last good state"):
        train_in(tmp_path, model, state, ROWS, VALID, PLAN, 0, lambda _: saved.append(_state_file(tmp_path)))
    assert _state_file(tmp_path) == saved[-1] and len(saved) == 2  # of steps 0 and 3
    assert state.step == 5 and all(np.isfinite(p).all() for p in state.trainable.values())


def _state_file(folder: Path) -> bytes:
    return (folder / STATE_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_rate_that_is_far_too_high_is_noticed(tmp_path: Path) -> None:
    model, state = new_run(optimizer="sgd")
    with pytest.raises(Diverged, match="the loss is"):
        train_in(tmp_path, model, state, ROWS, VALID, replace(PLAN, learning_rate=1e200, max_grad_norm=0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_state_that_a_divergence_leaves_is_one_with_a_finite_loss(tmp_path: Path) -> None:
    model, state = new_run(optimizer="sgd")
    plan = replace(PLAN, learning_rate=1e200, warmup=0, max_grad_norm=0, save_every=1)
    with pytest.raises(Diverged):
        train_in(tmp_path, model, state, ROWS, VALID, plan)
    saved_model, saved_state = new_run(optimizer="sgd")
    load_state(saved_state, tmp_path)
    assert math.isfinite(mean_loss(saved_model, batches_of(ROWS, 4, pad_id=0)))
