"""What Hypothesis draws: sizes, seeds, configurations of tiny models, adapters, and batches.

Hypothesis chooses shapes and seeds, and NumPy fills the arrays: a counterexample then prints as a few small numbers.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.methods.lora import LoRA
from minilora.model.config import ATTENTION, MLP, Config
from minilora.model.names import parameter_shapes

VOCAB = 11
QV = ("q_proj", "v_proj")
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = Config(
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    rope_layers=(True, True),
    tie_word_embeddings=True,
    biased=(),
    qk_norm=False,
    max_position_embeddings=64,
)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16.0,
}
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 16.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "attention_factor": 1.2,
    "truncate": 0.0,
}

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 5)


def normal(seed: int, *shape: int, stream: int = 0) -> np.ndarray:
    """Standard normal float64 numbers; another `stream` of the same seed is independent."""
    return np.random.default_rng([seed, stream]).normal(size=shape)


@st.composite
def configs(draw: st.DrawFn, max_layers: int = 2) -> Config:
    """A tiny transformer with every option of the real ones."""
    key_value_heads = draw(st.integers(1, 2))
    layers = draw(st.integers(1, max_layers))
    return Config(
        vocab_size=VOCAB,
        hidden_size=draw(st.sampled_from([3, 6, 8])),
        intermediate_size=draw(st.sampled_from([5, 7])),
        num_hidden_layers=layers,
        num_attention_heads=key_value_heads * draw(st.integers(1, 3)),
        num_key_value_heads=key_value_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(st.sampled_from([None, {"factor": 2.0}, LLAMA3, YARN])),
        rope_layers=tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers))),
        tie_word_embeddings=draw(st.booleans()),
        biased=draw(st.sampled_from(["", ATTENTION[:3], ATTENTION, MLP, ATTENTION + MLP]).map(tuple)),
        qk_norm=draw(st.booleans()),
        max_position_embeddings=64,
    )


def random_weights(config: Config, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint in float64 in which nothing is special: gains are not 1, biases not 0."""
    rng = np.random.default_rng([seed, 20])
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            weights[name] = rng.normal(size=shape) / np.sqrt(shape[1])
        else:
            weights[name] = ("norm" in name) + 0.3 * rng.normal(size=shape)
    return weights


def random_adapter(trainable: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """An adapter of the same shapes as after some training: B is not zero."""
    rng = np.random.default_rng([seed, 21])
    return {name: rng.normal(size=array.shape) / np.sqrt(array.shape[-1]) for name, array in trainable.items()}


@st.composite
def examples(draw: st.DrawFn, max_length: int = 5) -> Example:
    """Tokens, and which of them are trained."""
    length = draw(st.integers(1, max_length))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    trained = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return Example(tokens, trained)


@st.composite
def rows(draw: st.DrawFn, max_rows: int = 3, max_examples: int = 2) -> list[list[Example]]:
    """Rows of examples packed end to end, at least one token of which has a label."""
    row = st.lists(examples(), min_size=1, max_size=max_examples)
    drawn = draw(st.lists(row, min_size=1, max_size=max_rows))
    return [*drawn, [Example([1, 2, 3], [False, True, True])]]


def batches() -> st.SearchStrategy[Batch]:
    """Some rows side by side, with padding where they differ in length."""
    return st.builds(lambda drawn, left: collate(drawn, pad_id=0, left=left), rows(), st.booleans())


adapters = st.builds(
    LoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 16.0]),
    dropout=st.sampled_from([0.0, 0.5]),
    target_modules=st.one_of(
        st.just(("all-linear",)), st.lists(st.sampled_from(ROLES), min_size=1, unique=True).map(tuple)
    ),
    init=st.sampled_from(["kaiming", "gaussian"]),
    rslora=st.booleans(),
)
# Linear maps, the head among them.
targets = st.one_of(
    st.just(("all-linear",)),
    st.just(("lm_head", "q_proj")),
    st.lists(st.sampled_from(ROLES), min_size=1, unique=True).map(tuple),
)


@st.composite
def wide_adapters(draw: st.DrawFn) -> LoRA:
    """Beside linear maps of the layers also embedding and head, ranks by name, and modules that train whole."""
    more = st.lists(st.sampled_from(["embed_tokens", "lm_head", "down_proj"]), unique=True)
    whole = st.lists(st.sampled_from(["embed_tokens", "lm_head", "norm", "o_proj"]), unique=True)
    return LoRA(
        rank=draw(st.integers(1, 3)),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        target_modules=("q_proj", *draw(more)),
        rslora=draw(st.booleans()),
        rank_pattern=draw(st.sampled_from([{}, {"q_proj": 4}, {r".*\.0\..*": 2, "embed_tokens": 5}])),
        alpha_pattern=draw(st.sampled_from([{}, {"embed_tokens|lm_head": 3.0}])),
        modules_to_save=tuple(draw(whole)),
    )
