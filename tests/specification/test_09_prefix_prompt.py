"""Prefix and prompt tuning: exact gradients, the base after reading words at the start, and PEFT computes the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.commands import RUN_FILES, contents, good, run
from support.complex_step import Arrays, check_gradients
from support.device import BATCHES
from support.models import assert_same, loss_and_gradients_in_chunks, loss_only
from support.strategies import TINY, VOCAB, batches, configs, examples, normal, random_weights, rows, seeds

from minilora.adapters.merging import merged_parameters
from minilora.backend import to_host
from minilora.data.batches import Batch, collate, pad
from minilora.data.examples import Example
from minilora.formats.adapters import load_adapter, read_method, write_method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import LearnedPrefix, PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.generation import Memory, complete
from minilora.model.model import Model, backward, forward
from minilora.model.names import HEAD
from minilora.ops.attention import EVERYONE, QueryBlock, attention, visible_keys
from minilora.runs import folder as folder_module
from minilora.runs.run import default_max_length
from minilora.training.state import State
from minilora.training.step import loss_and_gradients

VirtualTokens = PrefixTuning | PromptTuning
FIRST, SECOND = "first.", "second."
BOTH = [PrefixTuning, PromptTuning]
methods = st.builds(lambda method, count: method(count), st.sampled_from(BOTH), st.integers(1, 3))
few, some = settings(max_examples=20), settings(max_examples=40)
each_method = pytest.mark.parametrize("method", BOTH, ids=["prefix", "prompt"])


def base(config: Config, seed: int, dtype: Any = np.float64) -> Model:
    return base_model(config, random_weights(config, seed), dtype)


class Tuned:
    """A tiny model with a prefix or a prompt in the midst of training."""

    def __init__(self, config: Config, method: VirtualTokens, seed: int) -> None:
        self.config, self.method, self.seed = config, method, seed
        started = method.start(base(config, seed), np.random.default_rng(seed), np.float64)
        self.trainable = {name: normal(seed, *P.shape, stream=7) for name, P in started.items()}

    def __repr__(self) -> str:
        return f"Tuned({self.config}, {self.method}, seed {self.seed})"

    def model(self, trainable: Arrays | None = None) -> Model:
        trainable = self.trainable if trainable is None else trainable
        return self.method.attach(base(self.config, self.seed, trainable[EMBEDDINGS].dtype), trainable)


tuned = st.builds(Tuned, configs(), methods, seeds)


# --- Exact gradients ---


@given(tuned, batches(), st.sampled_from([1, 1024]), st.booleans())
def test_the_gradient_of_a_prefix_and_of_a_prompt_is_exact_packed_padded_or_checkpointed(
    case: Tuned, batch: Batch, chunk: int, checkpointing: bool
) -> None:
    _, gradients = loss_and_gradients_in_chunks(case.model(), batch, None, chunk, checkpointing)
    check_gradients(lambda moved: loss_only(case.model(moved), batch, None), case.trainable, gradients)


@few
@given(configs(), batches(), st.sampled_from([Full(), LoRA(2, target_modules=("all-linear",))]), seeds)
def test_prefix_prompt_and_trained_sites_in_one_model_all_have_exact_gradients(
    config: Config, batch: Batch, sites: Full | LoRA, seed: int
) -> None:
    """The two share a name, so each is told apart here by a prefix of its own."""
    started = sites.start(base(config, seed), np.random.default_rng(seed), np.float64)
    trainable = {name: normal(seed, *p.shape, stream=1) for name, p in started.items()}
    first, second = Tuned(config, PrefixTuning(2), seed), Tuned(config, PromptTuning(1), seed + 1)
    trainable |= {FIRST + EMBEDDINGS: first.trainable[EMBEDDINGS], SECOND + EMBEDDINGS: second.trainable[EMBEDDINGS]}

    def attached(moved: Arrays) -> Model:
        adapted = sites.attach(base(config, seed, moved[FIRST + EMBEDDINGS].dtype), moved)
        with_prefix = first.method.attach(adapted, {EMBEDDINGS: moved[FIRST + EMBEDDINGS]})
        whole = second.method.attach(with_prefix, {EMBEDDINGS: moved[SECOND + EMBEDDINGS]})
        return replace(whole, prefix=Renamed(whole.prefix, FIRST), prompt=Renamed(whole.prompt, SECOND))

    _, gradients = loss_and_gradients_in_chunks(attached(trainable), batch, None, 1024)
    check_gradients(lambda moved: loss_only(attached(moved), batch, None), trainable, gradients)


class Renamed:
    """A prefix or a prompt whose gradient has a name of its own."""

    def __init__(self, before: Any, name: str) -> None:
        self.length, self.forward, self.before, self.name = before.length, before.forward, before, name

    def backward(self, gradient: Any) -> dict[str, np.ndarray]:
        return {self.name + key: value for key, value in self.before.backward(gradient).items()}


@some
@given(tuned, batches())
def test_virtual_tokens_alone_train_and_nothing_of_the_base_does(case: Tuned, batch: Batch) -> None:
    tuned_model, plain = case.model(), base(case.config, case.seed)
    assert loss_and_gradients(tuned_model, [batch])[1].keys() == {EMBEDDINGS}
    assert all(not site.trains for site in tuned_model.sites.values())
    assert tuned_model.sites.keys() == plain.sites.keys()


@some
@given(tuned, st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=4))
def test_going_on_from_a_past_the_virtual_tokens_in_it_are_constants(case: Tuned, tokens: list[int]) -> None:
    row, positions = np.array([tokens]), np.arange(len(tokens))[None]
    one, rest = ([a[:, :1], a[:, 1:]] for a in (row, positions))
    _, past, _ = forward(case.model(), one[0], rest[0], np.ones_like(one[0]))
    hidden, _, cache = forward(case.model(), one[1], rest[1], np.ones_like(one[1]), past)
    assert backward(case.model(), hidden, cache) == {}
    whole, _, _ = forward(case.model(), row, positions, np.ones_like(row))
    np.testing.assert_allclose(hidden, whole[1:], rtol=1e-10, atol=1e-12)


# --- The start ---


def hidden_states(of: Model, tokens: Sequence[int], dtype: Any = np.int64) -> np.ndarray:
    row = np.array([tokens], dtype)
    return np.asarray(forward(of, row, np.arange(len(tokens))[None], np.ones_like(row))[0])


words = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)


@some
@given(configs(), st.sampled_from(BOTH), words, st.lists(words, min_size=1, max_size=3), seeds)
def test_at_the_start_every_example_gets_what_the_base_gives_it_after_reading_the_words(
    config: Config, method: type[VirtualTokens], text: list[int], texts: list[list[int]], seed: int
) -> None:
    """Each alone, and all packed into one row: none sees another, all see the words."""
    plain, started = base(config, seed), method(len(text), tuple(text))
    tuned_model = started.attach(plain, started.start(plain, np.random.default_rng(seed), np.float64))
    expected = [hidden_states(plain, text + tokens)[len(text) :] for tokens in texts]
    packed = collate([[Example(tokens, [True] * len(tokens)) for tokens in texts]], 0)
    together, _, _ = forward(tuned_model, packed.tokens, packed.positions, packed.segments)
    np.testing.assert_allclose(together, np.concatenate(expected), rtol=1e-9, atol=1e-11)
    for tokens, right in zip(texts, expected, strict=True):
        np.testing.assert_allclose(hidden_states(tuned_model, tokens), right, rtol=1e-9, atol=1e-11)


@some
@given(configs(), words, words, words, seeds)
def test_a_prompt_beside_a_prefix_stands_behind_it(
    config: Config, first: list[int], second: list[int], tokens: list[int], seed: int
) -> None:
    plain, rng = base(config, seed), np.random.default_rng(seed)
    prefix, prompt = PrefixTuning(len(first), tuple(first)), PromptTuning(len(second), tuple(second))
    with_prefix = prefix.attach(plain, prefix.start(plain, rng, np.float64))
    both = prompt.attach(with_prefix, prompt.start(plain, rng, np.float64))
    expected = hidden_states(plain, first + second + tokens)[len(first + second) :]
    np.testing.assert_allclose(hidden_states(both, tokens), expected, rtol=1e-9, atol=1e-11)


@given(st.sampled_from(BOTH), st.integers(1, 7), words, seeds)
def test_a_text_is_repeated_or_cut_to_the_number_of_virtual_tokens_as_peft_does(
    method: type[VirtualTokens], count: int, text: list[int], seed: int
) -> None:
    rng, repeated = np.random.default_rng(seed), (text * count)[:count]
    one, other = (method(count, tuple(t)).start(base(TINY, seed), rng)[EMBEDDINGS] for t in (text, repeated))
    assert one.tobytes() == other.tobytes()


@each_method
def test_without_a_text_the_seed_draws_the_words(method: type[VirtualTokens]) -> None:
    def start(seed: int) -> bytes:
        return method(4).start(base(TINY, 0), np.random.default_rng(seed))[EMBEDDINGS].tobytes()

    assert start(1) == start(1) != start(2)


@some
@given(configs(), st.integers(1, 3), words, seeds)
def test_keys_and_values_of_zero_are_not_nothing(config: Config, count: int, tokens: list[int], seed: int) -> None:
    plain = base(config, seed)
    zero = PrefixTuning(count).start(plain, np.random.default_rng(0), np.float64)[EMBEDDINGS] * 0
    silent = replace(plain, prefix=LearnedPrefix(zero, config))
    assert not np.allclose(hidden_states(silent, tokens), hidden_states(plain, tokens), rtol=1e-6)


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_a_prefix_draws_each_output_of_attention_towards_its_own_by_its_share_of_the_weights(
    seed: int, time: int, count: int
) -> None:
    """y' = (1 − λ) y + λ y_P, where λ is the part of the softmax's sum that the prefix has."""
    q, k, v = (normal(seed, 1, time, 2, 4, stream=i) for i in range(3))
    k_p, v_p = (normal(seed, 1, count, 2, 4, stream=i) for i in (3, 4))
    causal, everything = np.tril(np.ones((1, time, time), bool)), np.ones((1, time, count), bool)
    y, y_p = attend(q, k, v, causal), attend(q, k_p, v_p, everything)
    own = (np.exp(np.einsum("bthd,bshd->bths", q, k) / 2) * causal[:, :, None]).sum(-1)[..., None]
    of_prefix = np.exp(np.einsum("bthd,bshd->bths", q, k_p) / 2).sum(-1)[..., None]
    share = of_prefix / (own + of_prefix)
    both = [np.concatenate(pair, axis=axis) for pair, axis in (((k_p, k), 1), ((v_p, v), 1), ((everything, causal), 2))]
    np.testing.assert_allclose(attend(q, *both), (1 - share) * y + share * y_p, rtol=1e-10, atol=1e-12)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Attention where `visible` says who sees whom."""
    everywhere = [slice(0, length) for length in visible.shape[1:]]
    return attention(q, k, v, [QueryBlock(*everywhere, visible)])[0]


# --- Layouts that change nothing ---


@given(st.lists(st.tuples(st.sampled_from([EVERYONE, 0, 1, 2]), st.integers(0, 3)), min_size=1, max_size=6))
def test_what_is_for_everyone_is_seen_from_every_segment_and_itself_sees_no_segment(
    tokens: list[tuple[int, int]],
) -> None:
    segments, positions = (np.array([column]) for column in zip(*tokens, strict=True))
    visible = visible_keys(positions, segments, positions, segments)
    for t, (segment, position) in enumerate(tokens):
        assert visible[0, t].tolist() == [s in (segment, EVERYONE) and p <= position for s, p in tokens]


@some
@given(tuned, st.lists(examples(), min_size=1, max_size=4))
def test_packed_end_to_end_each_example_sees_the_virtual_tokens_and_no_other_example(
    case: Tuned, drawn: list[Example]
) -> None:
    drawn = [*drawn, Example([1, 2, 3], [False, True, True])]
    assert_same(
        loss_and_gradients(case.model(), [collate([drawn], 0)]),
        loss_and_gradients(case.model(), [pad([example], 0) for example in drawn]),
    )


@some
@given(tuned, rows(), st.booleans())
def test_padding_before_or_behind_and_checkpointing_change_nothing(
    case: Tuned, drawn: list[list[Example]], checkpointing: bool
) -> None:
    left, right = ([collate(drawn, 0, left)] for left in (True, False))
    assert_same(loss_and_gradients(case.model(), left), loss_and_gradients(case.model(), right, None, checkpointing))


@some
@given(tuned, batches())
def test_run_again_a_layer_gives_the_same_bytes(case: Tuned, batch: Batch) -> None:
    results = [loss_and_gradients(case.model(), [batch], None, checkpointing) for checkpointing in (False, True)]
    (loss, gradients), (loss_again, gradients_again) = results
    assert (loss, gradients[EMBEDDINGS].tobytes()) == (loss_again, gradients_again[EMBEDDINGS].tobytes())


# --- Generation ---


def best_by_full_forward(of: Model, prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        logits, _ = of.sites[HEAD].forward(hidden_states(of, text)[-1:])
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


@few
@given(tuned, st.lists(words, min_size=1, max_size=4))
def test_generation_with_the_cache_gives_each_row_what_full_forwards_give_it_alone(
    case: Tuned, prompts: list[list[int]]
) -> None:
    """Rows of different lengths are padded on the left, between the virtual tokens and their first word."""
    expected = [best_by_full_forward(case.model(), prompt, 6) for prompt in prompts]
    assert complete(case.model(), prompts, 6, frozenset()) == expected


@few
@given(tuned, st.lists(words, min_size=1, max_size=3))
def test_a_memory_of_texts_goes_on_behind_the_virtual_tokens(case: Tuned, prompts: list[list[int]]) -> None:
    memory = Memory(case.model())
    for prompt in prompts:
        tokens = [token for _, token in zip(range(4), memory.stream(prompt), strict=False)]
        assert tokens == best_by_full_forward(case.model(), prompt, 4)


# --- Limits ---


@each_method
def test_virtual_tokens_take_room_from_the_text_and_must_leave_some(method: type[VirtualTokens]) -> None:
    plain, most = base(TINY, 0), TINY.max_position_embeddings - 2
    trainable = method(most).start(plain, np.random.default_rng(0))
    assert default_max_length(plain) == TINY.max_position_embeddings
    assert default_max_length(method(most).attach(plain, trainable)) == 2
    with pytest.raises(ValueError, match="--num-virtual-tokens 0 is less than 1"):
        method(0)
    for count in (most + 1,):
        with pytest.raises(ValueError, match=f"num_virtual_tokens {count} must be from 1 to 62"):
            method(count).start(plain, np.random.default_rng(0))


@each_method
def test_virtual_tokens_cannot_be_merged(method: type[VirtualTokens]) -> None:
    plain = base(TINY, 0)
    tuned_model = method(2).attach(plain, method(2).start(plain, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"virtual tokens .* cannot be merged"):
        list(merged_parameters(plain, tuned_model))


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
    assert (loss_there, answers_there) == (loss, answers)
    np.testing.assert_array_equal(gradient_there, gradient)


# --- PEFT's folders ---


def written(folder: Path, method: VirtualTokens, seed: int = 0) -> Path:
    case = Tuned(TINY, method, seed)
    trainable = {name: P.astype(np.float32) for name, P in case.trainable.items()}
    write_method(folder, method, trainable, TINY, "org/base", "main")
    return folder


@each_method
def test_what_is_written_is_read_again(method: type[VirtualTokens], tmp_path: Path) -> None:
    read, tensors = read_method(written(tmp_path, method(3)), base(TINY, 0))
    assert read == method(3)
    np.testing.assert_array_equal(tensors[EMBEDDINGS], load_file(tmp_path / "adapter_model.safetensors")[EMBEDDINGS])
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["token_dim"] == {PrefixTuning: 4, PromptTuning: 8}[method]  # the width of one key head, and of the model
    assert raw["num_attention_heads"] == {PrefixTuning: 1, PromptTuning: 2}[method]
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("org/base", "main")


@each_method
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"token_dim": 5}, r"config.json: token_dim is 5, but with this base model it is"),
        ({"num_layers": 3}, r"config.json: num_layers is 3, but with this base model it is 2"),
        ({"num_transformer_submodules": 2}, r"num_transformer_submodules is 2"),
        ({"num_virtual_tokens": None}, r"config.json: num_virtual_tokens is None, expected a whole number"),
        ({"num_virtual_tokens": 63}, r"config.json: num_virtual_tokens 63 must be from 1 to 62"),
        (
            {"num_virtual_tokens": 4},
            r"safetensors: tensors of wrong shape: prompt_embeddings \(3, .*\), expected \(4, ",
        ),
        ({"modules_to_save": ["lm_head"]}, r"config.json: modules_to_save \['lm_head'\] is not supported"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    method: type[VirtualTokens], changed: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path, method(3)) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=complaint):
        load_adapter(base(TINY, 0), tmp_path)


@each_method
def test_a_tensor_of_another_name_is_refused(method: type[VirtualTokens], tmp_path: Path) -> None:
    file = written(tmp_path, method(3)) / "adapter_model.safetensors"
    save_file({"embeddings": load_file(file)[EMBEDDINGS]}, file)
    with pytest.raises(ValueError, match="missing: prompt_embeddings; unexpected: embeddings"):
        load_adapter(base(TINY, 0), tmp_path)


# --- PEFT computes the same ---

FIXED = [[Example([1, 2, 3, 4], [True] * 4)], [Example([5, 6, 7, 8], [False, True, True, False])]]


def in_peft(peers: Any, theirs: Any, folder: Path) -> Any:
    """The peer with a folder's virtual tokens, which PEFT loads frozen and in float32; here they get a gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peers.peft.PeftModel.from_pretrained(theirs, folder)
    for encoder in theirs.prompt_encoder.values():
        encoder.embedding.weight = peers.torch.nn.Parameter(encoder.embedding.weight.data.double())
    return theirs.eval()


def peft_loss(peers: Any, theirs: Any, batch: Batch) -> tuple[Any, np.ndarray]:
    """Loss and logits, without those of virtual tokens. transformers shifts labels itself, so they are shifted back."""
    labels = np.full_like(batch.labels, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    tokens, mask, labels = (peers.torch.from_numpy(a) for a in (batch.tokens, batch.segments, labels))
    output = theirs(input_ids=tokens, attention_mask=mask, labels=labels)
    return output.loss, output.logits.detach().numpy()[:, -batch.tokens.shape[1] :]


@pytest.fixture(scope="session")
def peers() -> Any:
    """What the comparison with transformers uses; it needs PyTorch, transformers and PEFT."""
    return pytest.importorskip("test_peers")


@few
@given(st.data(), methods, seeds)
def test_peft_loads_our_folder_with_the_same_logits_loss_and_gradient(
    peers: Any, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, method: VirtualTokens, seed: int
) -> None:
    raw, batch = draw.draw(peers.raw_configs()), draw.draw(peers.padded_batches)
    config, folder = Config.from_dict(raw), tmp_path_factory.mktemp("ours")
    weights = random_weights(config, seed)
    plain = base_model(config, weights, np.float64)
    trainable = method.start(plain, np.random.default_rng(seed))
    trainable = {name: normal(seed, *P.shape).astype(np.float32) for name, P in trainable.items()}
    write_method(folder, method, trainable, config, "base")
    ours = load_adapter(plain, folder, "float64")
    loss, gradients = loss_and_gradients(ours, [batch])
    with peers.float64_throughout():
        plain_peer = peers.peer_of(raw, weights)
    theirs = in_peft(peers, plain_peer, folder)
    with peers.float64_throughout():
        their_loss, their_logits = peft_loss(peers, theirs, batch)
        their_loss.backward()
        (encoder,) = theirs.prompt_encoder.values()
        their_gradient = encoder.embedding.weight.grad.numpy()
    real = batch.segments > 0
    peers.assert_agree({"": peers.logits_of(ours, batch)[real]}, {"": their_logits[real]}, 1e-10)
    assert loss == pytest.approx(their_loss.item(), rel=1e-10)
    peers.assert_agree(gradients, {EMBEDDINGS: their_gradient}, 1e-10)


@pytest.mark.parametrize("kind", ["prefix", "projected prefix", "prompt"])
@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_a_folder_that_peft_wrote_has_the_same_logits_here(
    peers: Any, kind: str, model_type: str, tmp_path: Path
) -> None:
    """Of a prefix behind a projection, PEFT saves the keys and values that came out of it."""
    raw = {
        **{"model_type": model_type, "vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 20},
        **{"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False},
        **{"hidden_act": "silu", "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
        **({"no_rope_layers": [1, 0, 1]} if model_type == "smollm3" else {}),
    }
    config = Config.from_dict(raw)
    weights = {name: w.astype(np.float32) for name, w in random_weights(config, 3).items()}
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if kind == "prompt":
        settings_ = peers.peft.PromptTuningConfig(**fields)
    elif kind == "prefix":
        settings_ = peers.peft.PrefixTuningConfig(**fields)
    else:
        settings_ = peers.peft.PrefixTuningConfig(**fields, prefix_projection=True, encoder_hidden_size=5)
    theirs = peers.peft.get_peft_model(peers.peer_of(raw, weights), settings_).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base_model(config, weights), tmp_path)
    batch = collate(FIXED, 0)
    _, expected = peft_loss(peers, theirs, batch)
    np.testing.assert_allclose(peers.logits_of(ours, batch), expected, rtol=1e-4, atol=1e-5)


# --- The commands ---


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_train_generate_evaluate_and_resume_know_virtual_tokens_and_merge_refuses_them(
    method: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--method", method, "--num-virtual-tokens", 3]
    flags += ["--packing", "--activation-checkpointing", "--learning-rate", 0.05, "--eval-rows", 2]
    good("train", *flags, "--steps", 6, "--out", tmp_path / "whole")
    assert set(contents(tmp_path / "whole")) == RUN_FILES
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    width = {"prefix": 2 * 2 * 2 * 8, "prompt": 32}[method]
    assert summary["trainable_parameters"] == 3 * width
    assert summary["drift_kl"] > 0

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_state", interrupted_after(3))
        assert run("train", *flags, "--steps", 6, "--save-every", 3, "--out", tmp_path / "again").code == 130
    assert learnt(tmp_path / "again") != learnt(tmp_path / "whole")
    good("train", "--resume", tmp_path / "again")
    assert learnt(tmp_path / "again") == learnt(tmp_path / "whole")

    adapted = ["--model", model, "--adapter", tmp_path / "whole"]
    assert "drift_kl" in good("evaluate", *adapted, "--data", data / "pairs.jsonl")
    good("generate", *adapted, "--prompt", "up ->", "--max-tokens", 3)
    refused = run("generate", *adapted, "--prompt", "one " * 70)
    assert (refused.code, "the model sees 61" in refused.err) == (2, True)
    refused = run("merge", *adapted, "--out", tmp_path / "merged")
    assert (refused.code, "cannot be merged" in refused.err) == (2, True)
    refused = run("train", *flags[:-1], 0.1, "--num-virtual-tokens", 63, "--out", tmp_path / "none")
    assert refused.code == 2


def interrupted_after(step: int) -> Any:
    """`save_state` that ends as if the user had pressed Ctrl-C as soon as the state of this step is saved."""
    save = folder_module.save_state

    def save_or_stop(state: State, folder: Path) -> None:
        save(state, folder)
        if state.step == step:
            raise KeyboardInterrupt

    return save_or_stop


def learnt(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_an_initial_text_is_what_the_virtual_tokens_start_as(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--method", "prompt", "--num-virtual-tokens", 4]
    for text, out in (("up", "one"), ("up", "same"), ("down", "other")):
        flags_of_text = ["--prompt-tuning-init-text", text, "--steps", 1, "--learning-rate", 0, "--eval-rows", 0]
        good("train", *flags, *flags_of_text, "--out", tmp_path / out)
    assert learnt(tmp_path / "one") == learnt(tmp_path / "same") != learnt(tmp_path / "other")
