"""`docs/lora_in_one_file.py` is LoRA in one file, on NumPy alone, and equal to the package in every gradient."""

from __future__ import annotations

import numpy as np
from support.one_file import EXAMPLES, one_file, random_adapter

from minilora.data.batches import pad
from minilora.data.examples import Example
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.methods.lora import LoRA
from minilora.training.step import loss_and_gradients


def by_peft_name(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked by layer in the one file; one by one, and by PEFT's names, in the package."""
    return {
        f"model.layers.{i}.self_attn.{site}.lora_{letter}.weight": array
        for (site, letter), stacked in ((name.split("."), p) for name, p in arrays.items())
        for i, array in enumerate(stacked)
    }


def test_the_loss_and_every_gradient_of_the_one_file_are_those_of_the_package() -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL, np.float64)
    adapter = random_adapter(one, model)
    loss, grads = one.loss_and_gradients(model, adapter, EXAMPLES)

    base, _ = load_model(SHIPPED_MODEL, "float64")
    method = LoRA(rank=one.RANK, alpha=one.ALPHA, target_modules=("q_proj", "v_proj"))
    trainable = by_peft_name(adapter)
    assert trainable.keys() == method.start(base, np.random.default_rng(0)).keys()
    examples = [Example(tokens, [t >= n for t in range(len(tokens))]) for tokens, n in EXAMPLES]
    expected_loss, expected = loss_and_gradients(method.attach(base, trainable), [pad(examples, pad_id=0)])

    assert abs(loss - expected_loss) < 1e-10
    ours = by_peft_name(grads)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert ours[name].dtype == np.float64
        assert np.abs(gradient).max() > 1e-6  # there is something to compare
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-10, err_msg=name)


def test_a_fresh_adapter_of_the_one_file_moves_B_alone_and_its_gradients_stay_single_precision() -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL)
    _, grads = one.loss_and_gradients(model, one.start(model, np.random.default_rng(0)), EXAMPLES)
    for name, gradient in grads.items():
        assert gradient.dtype == np.float32
        assert gradient.any() == name.endswith(".B")


def test_merged_equals_adapted() -> None:
    """x (W + s B A)ᵀ is x Wᵀ + s (x Aᵀ) Bᵀ."""
    one = one_file()
    model = one.load(SHIPPED_MODEL, np.float64)
    adapter = random_adapter(one, model)
    fresh = one.start(model, np.random.default_rng(2))
    tokens, _ = EXAMPLES[0]
    adapted, _ = one.forward(model, adapter, tokens)
    merged, _ = one.forward(one.merge(model, adapter), fresh, tokens)
    base, _ = one.forward(model, fresh, tokens)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-10)
    assert np.abs(adapted - base).max() > 0.1
