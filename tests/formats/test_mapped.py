"""A base that stays in its file: mapped, never copied, asked for a layer ahead, and the same to the last bit."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support import commands
from support.commands import ADAPTER, PAIRS, assert_refused, good, read, run, write_rows
from support.mapped_files import write_at
from support.small_checkpoints import quick
from support.small_tokenizer import write_tokenizer
from support.strategies import random_weights

from minilora.data.batches import Batch
from minilora.formats.checkpoint import DTYPES, SINGLE, read_config, read_weights, write_checkpoint
from minilora.formats.load import load_model
from minilora.formats.mapped import mapped_tensors
from minilora.frozen import mapped
from minilora.frozen.mapped import ask_for, let_go
from minilora.methods.lora import LoRA
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, parameter_shapes
from minilora.training.step import loss_and_gradients

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CONFIG = commands.CONFIG | {"vocab_size": 320}
UNTIED = CONFIG | {"tie_word_embeddings": False}


def folder_of(folder: Path, raw: dict[str, Any] = CONFIG, dtype: str = "bfloat16", shards: int = 5_000_000_000) -> Path:
    """A model with a tokenizer, large enough in its numbers that a difference would show."""
    write_tokenizer(folder)
    weights = {name: w.astype(np.float32) for name, w in random_weights(Config.from_dict(raw), 0).items()}
    write_checkpoint(folder, raw, weights, dtype, shards)
    return folder


def owner(array: Any) -> object:
    """What owns the memory of an array."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


# --- Tensors ---


@quick
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=4, max_size=4),
    odd=st.integers(0, 9),
)
def test_a_mapped_tensor_is_the_files_own_bytes_wherever_they_begin(
    tmp_path: Path, shapes: list[list[int]], dtypes: list[str], odd: int
) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": rng.integers(-9, 9, shape).astype(DTYPES[dtype])
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = write_at(tmp_path / "t.safetensors", tensors, odd)
    theirs, ours = load_file(path), mapped_tensors(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert tensor.tobytes() == theirs[name].tobytes()
        assert not tensor.flags.writeable and isinstance(owner(tensor), mmap.mmap)


@pytest.mark.parametrize("raw", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_every_matrix_of_a_mapped_base_lies_in_its_file(tmp_path: Path, raw: dict[str, Any]) -> None:
    model, _ = load_model(folder_of(tmp_path / "model", raw, shards=20_000), frozen="mapped")
    assert len([*(tmp_path / "model").glob("model-*.safetensors")]) > 2
    weights: list[Any] = [site.weight for site in model.sites.values() if hasattr(site, "weight")]
    assert len(weights) == 2 * 7 + 2
    for held in weights:
        assert isinstance(owner(held.array), mmap.mmap) and isinstance(owner(held.weight.W), mmap.mmap)


def test_a_head_beside_the_embedding_that_it_is_tied_to_may_be_a_copy_and_nothing_else(tmp_path: Path) -> None:
    config, _ = read_config(folder_of(tmp_path, dtype="float32"))
    weights = dict(load_file(tmp_path / SINGLE))
    embed = f"{EMBED}.weight"
    write_at(tmp_path / SINGLE, weights | {f"{HEAD}.weight": weights[embed]})
    assert {*read_weights(tmp_path, config, mapped=True)} == {*weights}
    other = weights[embed].copy()
    other[-1, -1] += 1
    write_at(tmp_path / SINGLE, weights | {f"{HEAD}.weight": other})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from"):
        read_weights(tmp_path, config, mapped=True)


@pytest.mark.parametrize("how", ["cut off", "not finite"])
def test_a_file_that_is_cut_off_or_holds_no_numbers_is_refused_before_it_is_used(tmp_path: Path, how: str) -> None:
    path = folder_of(tmp_path / "model") / SINGLE
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-2] if how == "cut off" else data[:-2] + b"\x80\x7f")  # infinity in bfloat16
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = ["--model", path.parent, "--data", rows, "--frozen", "mapped", "--out", tmp_path / "run"]
    assert_refused(run("train", *flags), SINGLE, "whole" if how == "cut off" else "not finite")


# --- The pages ---


def test_a_layer_asks_for_the_next_one_forwards_and_for_the_one_before_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And lets go of the one that it comes from. The head is the last layer; with checkpointing a layer runs again
    before its backward."""
    base, _ = load_model(folder_of(tmp_path), frozen="mapped")
    names = {}
    for name, site in base.sites.items():
        if name.startswith("model.layers."):
            names[id(getattr(getattr(site, "weight", None), "array", site))] = int(name.split(".")[2])
    head: Any = base.sites[HEAD]
    names[id(head.weight.array)] = 2
    said: list[tuple[str, int]] = []

    def advised(arrays: Any, advice: str) -> None:
        layers = {names[id(array)] for array in arrays}
        assert len(arrays) == (0 if not layers else 1 if layers == {2} else 7)
        said.extend((advice[len("MADV_") :], layer) for layer in layers)

    monkeypatch.setattr(mapped, "_advise", advised)
    method = LoRA(2, target_modules=("all-linear",))
    model = method.attach(base, method.start(base, np.random.default_rng(0)))
    tokens = np.array([[5, 6, 7, 8]])
    batch: Any = (tokens, np.roll(tokens, -1), np.arange(4)[None], np.ones_like(tokens))
    loss_and_gradients(model, [Batch(*batch)], [0], checkpointing=True)
    asked = [layer for advice, layer in said if advice == "WILLNEED"]
    gone = [layer for advice, layer in said if advice == "DONTNEED"]
    first_time = list(dict.fromkeys(asked))
    assert first_time == [1, 2, 0], "layer 0 asks for 1, 1 for the head, and layer 1's backward for 0"
    assert asked.index(0) > asked.index(2) and gone.index(0) < gone.index(1) < gone.index(2)


def test_memory_that_is_in_no_file_is_never_let_go() -> None:
    """The system would clear it."""
    array = np.arange(100_000.0)
    let_go([array, array[5_000:], np.empty(0)])
    ask_for([array])
    assert (array == np.arange(100_000.0)).all()


def test_pages_that_were_let_go_are_read_again(tmp_path: Path) -> None:
    tensors = {"a": np.arange(30_001, dtype=np.float32), "b": np.ones(3, np.float16)}
    found = mapped_tensors(write_at(tmp_path / "t.safetensors", tensors, odd=2))
    for _ in range(2):
        assert found["a"].tobytes() == tensors["a"].tobytes() and (found["b"] == 1).all()
        let_go([*found.values()])
        ask_for([*found.values()])


# --- Training ---


def test_training_on_a_mapped_base_writes_the_very_bytes_of_training_on_one_in_memory(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", shards=20_000)
    flags = ["--model", model, "--data", write_rows(tmp_path / "rows.jsonl", PAIRS)]
    flags += "--steps 4 --eval-rows 0 --batch-size 2 --learning-rate 0.1".split()
    written = {}
    for frozen, more in {"stored": [], "mapped": [], "mapped again": ["--activation-checkpointing"]}.items():
        out = tmp_path / frozen
        good("train", *flags, *more, "--frozen", frozen.split()[0], "--out", out)
        written[frozen] = (out / ADAPTER).read_bytes()
    assert written["stored"] == written["mapped"] == written["mapped again"]
    assert read(tmp_path / "mapped" / "settings.json")["frozen"] == "mapped"
    answers = [
        good("generate", "--model", model, "--adapter", tmp_path / "mapped", "--frozen", frozen, "--prompt", "up ->")
        for frozen in ("stored", "mapped")
    ]
    assert answers[0] == answers[1]


ALLOWED = 50_000_000  # bytes
PROCESS = """
import json, resource, sys
from pathlib import Path
import numpy as np
from minilora.data.batches import Batch
from minilora.formats.load import load_model
from minilora.methods.lora import LoRA
from minilora.training.step import loss_and_gradients

def own():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    return 1024 * int(line.split()[1])

ones = np.ones((600, 600), np.float32)
ones @ ones  # the BLAS takes its memory
most = own() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
base, _ = load_model(Path(sys.argv[1]), frozen="mapped")
method = LoRA(4, target_modules=("all-linear",))
model = method.attach(base, method.start(base, np.random.default_rng(0)))
tokens = np.arange(16)[None]
batch = Batch(tokens, np.roll(tokens, -1), tokens, np.ones_like(tokens))
loss, gradients = loss_and_gradients(model, [batch], [0], checkpointing=True)
mappings = [block for block in Path("/proc/self/smaps").read_text().split("VmFlags") if ".safetensors" in block]
pages = [line.split() for block in mappings for line in block.splitlines()]
copied = sum(int(line[1]) for line in pages if line[0] in ("Private_Dirty:", "Anonymous:"))
print(json.dumps({"loss": loss, "mappings": len(mappings), "copied": copied}))
"""


@only_linux
def test_a_mapped_base_trains_in_a_process_that_may_not_have_half_of_its_bytes(tmp_path: Path) -> None:
    """RLIMIT_DATA is a hard limit on the memory that is the process's own: no more of it may even be promised."""
    raw = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14}
    folder, rng = tmp_path / "model", np.random.default_rng(0)
    few = (0.02 * rng.standard_normal(10_007)).astype(np.float32)
    shapes = parameter_shapes(Config.from_dict(raw)).items()
    weights = {name: np.resize(few, shape) if len(shape) == 2 else np.ones(shape, np.float32) for name, shape in shapes}
    write_checkpoint(folder, raw, weights, "bfloat16")
    size = (folder / SINGLE).stat().st_size
    assert size > 2 * ALLOWED

    command = [sys.executable, "-c", PROCESS, str(folder), str(ALLOWED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    in_file = json.loads(done.stdout)
    tokens = np.arange(16)[None]
    batch = Batch(tokens, np.roll(tokens, -1), tokens, np.ones_like(tokens))
    base, _ = load_model(folder, frozen="stored")
    method = LoRA(4, target_modules=("all-linear",))
    model = method.attach(base, method.start(base, np.random.default_rng(0)))
    assert in_file["loss"] == loss_and_gradients(model, [batch], [0])[0]
    assert in_file["mappings"] == 1
    assert in_file["copied"] == 0, "no page of the file is the process's own"
