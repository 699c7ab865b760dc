"""Hugging Face checkpoints in and out: `config.json` and `model.safetensors`, whole or in shards, read strictly.

Where a model is read, a GGUF file may stand for the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import ml_dtypes
import numpy as np

from minilora.backend import HostArray
from minilora.formats.files import check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.formats.finite import finite
from minilora.formats.gguf import gguf_config, gguf_weights
from minilora.formats.gguf_file import is_gguf
from minilora.formats.mapped import STORED, mapped_tensors
from minilora.frozen.mapped import let_go
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, Shape, parameter_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MISFIT = "The weights and config.json do not belong together."


class IndexKeys(TypedDict):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a checkpoint, parsed and as it stands in the file."""
    folder = Path(folder)
    if is_gguf(folder):
        raw = gguf_config(folder)
        return _parsed(folder, raw), raw
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. minilora reads local checkpoints: "
            "fetch one with `hf download NAME --local-dir FOLDER`"
        )
    return read_config_file(folder / "config.json")


def read_config_file(path: Path) -> tuple[Config, dict[str, Any]]:
    """The same, from one file."""
    raw = read_json(path)
    return _parsed(path, raw), raw


def _parsed(path: Path, raw: dict[str, Any]) -> Config:
    try:
        return Config.from_dict(raw)
    except (ValueError, TypeError, ArithmeticError) as error:  # the last two: a text or a zero where a number belongs
        raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


class Weights(Mapping[str, HostArray]):
    """The tensors of a checkpoint in their stored dtype. Each is read from its file when it is asked for, so that a
    model is never in memory twice: as stored, and as it computes. With `mapped` each stays in its file."""

    def __init__(self, places: Mapping[str, Path], mapped: bool = False) -> None:
        self.places = places
        self.mapped = {path: mapped_tensors(path) for path in {*places.values()}} if mapped else {}

    def __getitem__(self, name: str) -> HostArray:
        path = self.places[name]
        if self.mapped:
            tensor = finite(path, name, self.mapped[path][name])
            let_go([tensor])
            return tensor
        with open_safetensors(path) as file:  # anew each time: pages of one long mapping would be a copy
            return finite(path, name, np.asarray(file.get_tensor(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_weights(folder: Path, config: Config, mapped: bool = False) -> Mapping[str, HostArray]:
    """Every tensor of the configuration, and not one more or less; `mapped`, as views of their files.

    Two things that old files hold are passed over: buffers of RoPE, and the head of a tied model if it is a copy.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_weights(folder, config)
    places: dict[str, Path] = {}
    found: dict[str, Shape] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name in places:
                    raise ValueError(f"{path}: {name} is in {places[name].name} too: remove one of the two")
                header = file.get_slice(name)
                if header.get_dtype() not in STORED:
                    raise ValueError(f"{path}: {name} is stored as {header.get_dtype()}, not as {', '.join(STORED)}")
                places[name], found[name] = path, tuple(header.get_shape())

    expected = parameter_shapes(config)
    head, embed = f"{HEAD}.weight", f"{EMBED}.weight"
    copied_head = config.tie_word_embeddings and head in found
    check_shapes(folder, expected | ({head: expected[embed]} if copied_head else {}), found, MISFIT)

    weights = Weights({name: places[name] for name in expected}, mapped)
    if copied_head and not _same_bytes(*(Weights(places, mapped=True)[name] for name in (head, embed))):
        raise ValueError(
            f"{places[head]}: {head} differs from {embed}, but config.json ties them: "
            "set tie_word_embeddings to false, or remove the head"
        )
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the tensors of a checkpoint."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickled = any(folder.glob("pytorch_model*.bin"))
        advice = "convert pytorch_model.bin to safetensors" if pickled else "copy or download the checkpoint whole"
        raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}: {advice}")
    index = folder / INDEX
    shards = sorted(set(read_json(index, IndexKeys)["weight_map"].values()))
    if not shards:
        raise ValueError(f"{index}: 'weight_map' is empty")
    for shard in shards:
        # An index from elsewhere must not make us open a file outside the folder.
        if shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
            raise ValueError(f"{index}: shard {shard!r} is not a plain file name")
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"{folder / shard}: this shard, which {INDEX} names, is missing: copy or download the checkpoint whole"
            )
    return [folder / shard for shard in shards]


def _same_bytes(a: HostArray, b: HostArray) -> bool:
    return a.dtype == b.dtype and all(
        bool(np.array_equal(row.view(np.uint8), other.view(np.uint8))) for row, other in zip(a, b, strict=True)
    )


def write_checkpoint(
    folder: Path,
    raw_config: Mapping[str, Any],
    weights: Mapping[str, HostArray],
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that transformers and `read_weights` load, over an old one in the folder if there is one.

    Converting rounds to nearest even, shard by shard; a number too large for the dtype is a ValueError.
    """
    folder, target = Path(folder), named_dtype(dtype)
    found = {name: tensor.shape for name, tensor in weights.items()}
    check_shapes(folder, parameter_shapes(Config.from_dict(dict(raw_config))), found, MISFIT)
    shards = _split(weights, target.itemsize, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    else:  # old files go first: a killed process must not leave a mixture that looks whole
        for old in (SINGLE, INDEX):
            (folder / old).unlink(missing_ok=True)

    write_json(folder / "config.json", {**raw_config, "dtype": dtype, "torch_dtype": dtype})
    for name, shard in zip(names, shards, strict=True):
        converted = {key: as_dtype(key, weights[key], target) for key in shard}
        write_safetensors(folder / name, converted, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.size for tensor in weights.values()) * target.itemsize
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(INDEX)
    for path in (folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in names:
            path.unlink(missing_ok=True)


def named_dtype(name: str) -> np.dtype[Any]:
    """The dtype with this name, one of those a checkpoint may have."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose {', '.join(DTYPES)}")
    return DTYPES[name]


def _split(weights: Mapping[str, HostArray], itemsize: int, limit: int) -> list[list[str]]:
    """Names in their order, in shards of at most `limit` bytes; a larger tensor has a shard to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        size = tensor.size * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def as_dtype(name: str, tensor: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """The tensor in another dtype, rounded to nearest even. ValueError, naming it, where a number is too large."""
    try:
        with np.errstate(over="raise"):
            return finite("to be written", name, tensor.astype(dtype, copy=False))
    except FloatingPointError as error:
        raise ValueError(f"{name} holds numbers too large for {dtype.name}: choose another dtype") from error


def random_weights(config: Config, seed: int, dtype: str = "float32", std: float = 0.02) -> dict[str, HostArray]:
    """Matrices normal(0, std), gains of norms one, biases zero.

    Drawn in float32 and converted tensor by tensor, so that memory holds the model once.
    """
    rng, target = np.random.default_rng(seed), named_dtype(dtype)
    weights: dict[str, HostArray] = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith(".bias"):
            tensor = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            tensor = np.ones(shape, np.float32)
        else:
            tensor = rng.standard_normal(shape, np.float32)
            tensor *= np.float32(std)
        weights[name] = tensor.astype(target, copy=False)
    return weights
