"""llama.cpp agrees: on files that minilora reads and on those that it writes, with an adapter beside them or merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import good
from support.gguf_models import (
    BLOCKS_OF_32,
    LLAMA,
    SCALES_OF_256,
    SHAPES,
    in_blocks_of,
    real_smollm2,
    write_adapter_of,
    write_model,
)

from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import load_adapter
from minilora.formats.load import load_model
from minilora.methods.lora import LoRA
from minilora.model.model import Model, forward
from minilora.model.names import HEAD

pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")

PROMPTS = (
    "The capital of France is", "Two plus two", "How are you?", "Once upon a time", "def f(x):\n    return",
    "In 1969 12345 people", "Ünïcödé 数字 are", "  two  spaces\n\n\nand lines", "What's that? I'll see, they've", "A",
    "\n", "thank you", "assistant", "The\tsky is", "1 2 3 4 5", "<|im_start|>user\nHello<|im_end|>\n", "Water boils at",
    "It is four.", "SELECT name FROM", "\n\n1. First",
)  # fmt: skip
TOKENS = 12


class LlamaCpp:
    """A file in llama.cpp, computing in float32 where the file lets it."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # it waits for others by spinning
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | Sequence[int]) -> tuple[list[int], list[dict[int, float]], int]:
        """The greedy tokens, the log-probabilities of the best three at each place, and the length of the prompt."""
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "n_probs": 3, "cache_prompt": False}
        )
        places = answer["choices"][0]["logprobs"]["content"]
        best = [{one["id"]: one["logprob"] for one in place["top_logprobs"]} for place in places]
        return [place["id"] for place in places], best, answer["usage"]["prompt_tokens"]


def log_probabilities(model: Model, ids: Sequence[int]) -> np.ndarray:
    """(T, V)."""
    tokens = np.array([ids])
    hidden = forward(model, tokens, np.arange(len(ids))[None], np.ones_like(tokens), keep=False)[0]
    z = np.asarray(model.sites[HEAD].forward(hidden)[0], np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def compared(model: Model, tokenizer: Tokenizer, theirs: LlamaCpp) -> tuple[float, float]:
    """On twenty prompts: the largest |difference| of the log-probabilities of the best three at each place, and the
    share of llama.cpp's greedy tokens that are minilora's too, each after the same tokens."""
    differences, same = [], []
    for prompt in PROMPTS:
        ids = tokenizer.with_bos(tokenizer.encode(prompt))
        tokens, best, length = theirs.complete(prompt)
        assert length == len(ids), f"{prompt!r} is {length} tokens in llama.cpp and {len(ids)} here"
        ours = log_probabilities(model, [*ids, *tokens])[len(ids) - 1 :]
        for place, (token, three) in enumerate(zip(tokens, best, strict=True)):
            same.append(int(ours[place].argmax()) == token)
            differences += [abs(ours[place][id] - value) for id, value in three.items()]
    assert len(same) > 5 * len(PROMPTS), "most answers ended at once"
    return max(differences), float(np.mean(same))


def check(path: Path, model: Model, tokenizer: Tokenizer, within: float, adapter: Path | None = None) -> None:
    difference, same = compared(model, tokenizer, LlamaCpp(path, adapter))
    print(f"{path.name}: log-probabilities within {difference:.1e}, {same:.1%} of the greedy tokens")
    assert difference < within
    assert same == 1 or (within > 0.02 and same > 0.9), "only products in few bits may decide a near tie otherwise"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_written_model_has_the_same_tokens_and_probabilities_in_llama_cpp(tmp_path: Path, shape: str) -> None:
    source = write_model(tmp_path / "model", SHAPES[shape])
    good("convert", "--model", source, "--format", "gguf", "--out", tmp_path / "model.gguf")
    check(tmp_path / "model.gguf", load_model(source)[0], Tokenizer.load(source), within=2e-5)


@pytest.mark.parametrize(("dtype", "within"), [("float16", 0.02), ("bfloat16", 0.1), ("q8_0", 0.3)])
def test_a_model_in_fewer_bits_is_in_llama_cpp_nearly_what_it_is_here(
    tmp_path: Path, dtype: str, within: float
) -> None:
    """There its products are in these few bits too; here only its weights are."""
    source = write_model(tmp_path / "model")
    good("convert", "--model", source, "--format", "gguf", "--dtype", dtype, "--out", tmp_path / f"{dtype}.gguf")
    check(tmp_path / f"{dtype}.gguf", load_model(tmp_path / f"{dtype}.gguf")[0], Tokenizer.load(source), within)


@pytest.mark.parametrize("kind", [*BLOCKS_OF_32, *SCALES_OF_256])
def test_a_file_in_blocks_is_read_as_llama_cpp_reads_it(tmp_path: Path, kind: str) -> None:
    raw = LLAMA if kind in BLOCKS_OF_32 else LLAMA | {"hidden_size": 256, "intermediate_size": 256}
    good("convert", "--model", write_model(tmp_path / "m", raw), "--format", "gguf", "--out", tmp_path / "m.gguf")
    path = in_blocks_of(kind, tmp_path / "m.gguf", tmp_path / f"{kind}.gguf")
    # llama.cpp rounds activations to 8 bits, by one scale for 32 numbers or, in kinds with 256, for 256 of them.
    check(path, load_model(path)[0], Tokenizer.load(path), within=0.5 if kind in BLOCKS_OF_32 else 0.8)


ADAPTERS: dict[str, tuple[str, LoRA]] = {
    "all linear": ("tied", LoRA(rank=4, alpha=8)),
    "rslora": ("tied", LoRA(rank=4, alpha=4, rslora=True)),
    "patterns": ("wide heads", LoRA(rank=2, alpha_pattern={"q_proj": 7}, rank_pattern={"k_proj": 8, "up_proj": 3})),
    "embedding and head": (
        "untied with biases",
        LoRA(rank=3, target_modules=("embed_tokens", "lm_head", "q_proj", "o_proj")),
    ),
    "smollm3": ("smollm3", LoRA(rank=4)),
    "qwen2": ("qwen2", LoRA(rank=4)),
    "qwen3": ("qwen3", LoRA(rank=4)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_same_tokens_and_probabilities_in_llama_cpp_beside_its_base_and_merged(
    tmp_path: Path, name: str
) -> None:
    shape, method = ADAPTERS[name]
    source = write_model(tmp_path / "model", SHAPES[shape])
    adapter = write_adapter_of(source, tmp_path / "adapter", method)
    good("convert", "--model", source, "--format", "gguf", "--out", tmp_path / "base.gguf")
    good("convert", "--adapter", adapter, "--format", "gguf", "--out", tmp_path / "adapter.gguf")
    base, tokenizer = load_model(source)[0], Tokenizer.load(source)
    adapted = load_adapter(base, adapter)
    changed = np.abs(log_probabilities(adapted, [5, 6, 7]) - log_probabilities(base, [5, 6, 7])).max()
    assert changed > 0.1, "the adapter would not be missed"
    check(tmp_path / "base.gguf", adapted, tokenizer, within=2e-5, adapter=tmp_path / "adapter.gguf")
    merged = ["--model", source, "--adapter", adapter, "--format", "gguf"]
    good("merge", *merged, "--out", tmp_path / "merged" / "merged.gguf")
    check(tmp_path / "merged" / "merged.gguf", adapted, tokenizer, within=2e-5)


def test_a_merge_that_unties_or_adds_biases_is_a_model_in_llama_cpp(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    adapter = write_adapter_of(source, tmp_path / "adapter", LoRA(rank=3, target_modules=("lm_head", "q_proj")))
    merged = [
        "--model",
        source,
        "--adapter",
        adapter,
        "--format",
        "gguf",
        "--out",
        tmp_path / "m" / "m.gguf",
        "--untie",
    ]
    good("merge", *merged)
    check(tmp_path / "m" / "m.gguf", load_adapter(load_model(source)[0], adapter), Tokenizer.load(source), within=2e-5)


@pytest.mark.parametrize("post_processor", ["bos", "none", "eos"])
def test_both_put_bos_and_eos_around_a_prompt_or_neither(tmp_path: Path, post_processor: str) -> None:
    source = write_model(tmp_path / "model", post_processor=post_processor)
    good("convert", "--model", source, "--format", "gguf", "--out", tmp_path / "m.gguf")
    theirs = LlamaCpp(tmp_path / "m.gguf")
    for tokenizer in (Tokenizer.load(source), Tokenizer.load(tmp_path / "m.gguf")):
        whole = tokenizer.backend.encode("How are you?").ids
        assert theirs.complete("How are you?")[2] == len(whole)


# --- The real SmolLM2 ---


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path = real_smollm2()
    folder = tmp_path_factory.mktemp("smollm2")
    good("convert", "--model", path, "--format", "gguf", "--out", folder / "f32.gguf")
    yield {"path": path, "folder": folder, "model": load_model(path)[0], "tokenizer": Tokenizer.load(path)}


def test_the_real_smollm2_has_the_same_tokens_and_probabilities_in_llama_cpp(smollm2: dict[str, Any]) -> None:
    check(smollm2["folder"] / "f32.gguf", smollm2["model"], smollm2["tokenizer"], within=1e-3)


def test_the_real_smollm2_in_4_bits_is_nearly_the_same_in_llama_cpp(smollm2: dict[str, Any]) -> None:
    check(smollm2["path"], smollm2["model"], smollm2["tokenizer"], within=0.8)


def test_an_adapter_on_the_real_smollm2_is_the_same_in_llama_cpp(smollm2: dict[str, Any], tmp_path: Path) -> None:
    adapter = write_adapter_of(smollm2["path"], tmp_path / "adapter", LoRA(rank=8, alpha=2, rslora=True))
    good("convert", "--adapter", adapter, "--format", "gguf", "--out", tmp_path / "adapter.gguf")
    adapted = load_adapter(smollm2["model"], adapter)
    base = smollm2["folder"] / "f32.gguf"
    check(base, adapted, smollm2["tokenizer"], within=1e-3, adapter=tmp_path / "adapter.gguf")
