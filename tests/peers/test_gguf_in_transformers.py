"""transformers reads the same GGUF file, and the folder that minilora makes of it: the same ids, logits and tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.commands import good
from support.gguf_models import in_blocks_of, real_smollm2, write_model

from minilora.data.tokenizer import Tokenizer
from minilora.formats.load import load_model
from minilora.model.generation import complete
from minilora.model.model import Model, forward
from minilora.model.names import HEAD

pytest.importorskip("gguf")
torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

CHAT = [{"role": "user", "content": "Tell me about the moon, and what people have done there."}]


def logits(model: Model, ids: list[int]) -> np.ndarray:
    tokens = np.array([ids])
    hidden = forward(model, tokens, np.arange(len(ids))[None], np.ones_like(tokens), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0])


def check(path: Path, folder: Path, within: float, tokens: int) -> None:
    """transformers on the file itself, and on the folder, against minilora on the file."""
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(tokenizer.chat(CHAT, add_generation_prompt=True))
    ours, greedy = (model := load_model(path)[0]) and logits(model, ids), complete(model, [ids], tokens, frozenset())[0]
    for where, options in ((path.parent, {"gguf_file": path.name}), (folder, {})):
        words = transformers.AutoTokenizer.from_pretrained(where, **options)
        assert words.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == ids
        theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval()
        asked = torch.tensor([ids])
        with torch.no_grad():
            np.testing.assert_allclose(ours, theirs(asked).logits[0].numpy(), rtol=0, atol=within)
            everything = torch.ones_like(asked)  # else it would hide the prompt's <|im_end|>, which is its padding too
            made = theirs.generate(
                asked, attention_mask=everything, max_new_tokens=tokens, do_sample=False, eos_token_id=-1
            )
        assert made[0, len(ids) :].tolist() == greedy


def test_a_small_quantised_file_is_the_same_in_transformers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    good("convert", "--model", source, "--format", "gguf", "--out", tmp_path / "model.gguf")
    path = in_blocks_of("Q4_1", tmp_path / "model.gguf", tmp_path / "q4_1.gguf")
    good("convert", "--model", path, "--out", tmp_path / "folder")
    check(path, tmp_path / "folder", within=1e-4, tokens=20)


def test_the_real_smollm2_is_the_same_in_transformers_over_80_tokens_and_knows_paris(tmp_path: Path) -> None:
    path = real_smollm2()
    good("convert", "--model", path, "--out", tmp_path / "folder")
    check(path, tmp_path / "folder", within=1e-3, tokens=80)
    prompt = ["--prompt", "The capital of France is", "--max-tokens", 4]
    assert good("generate", "--model", path, *prompt).startswith(" Paris")
    assert good("generate", "--model", path, "--frozen", "stored", *prompt).startswith(" Paris")
