"""A fingerprint of a base model: equal for copies of one model, different for two models, and quickly taken.

It is a digest of the configuration, and of the name, dtype, shape and some bytes of every tensor: all of a small
tensor, and pieces from all over a large one. Two models that were trained differently differ in nearly every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.formats.checkpoint import read_config, weight_files
from minilora.formats.gguf_file import is_gguf, open_gguf
from minilora.formats.mapped import places

PIECES, PIECE = 8, 512  # of one tensor, and bytes of each


def fingerprint(folder: Path) -> str:
    """Of a model folder, however its tensors are spread over files, or of a GGUF file."""
    config, _ = read_config(folder)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, kind, shape, pieces in sorted(_gguf(folder) if is_gguf(folder) else _safetensors(folder)):
        digest.update(json.dumps([name, kind, shape]).encode() + pieces)
    return digest.hexdigest()[:32]


def _safetensors(folder: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    for path in weight_files(folder):
        found = places(path)
        with path.open("rb") as file:
            for name, (kind, shape, begin, end) in found.items():
                pieces = []
                for offset, length in _pieces(end - begin):
                    file.seek(begin + offset)
                    pieces.append(file.read(length))
                yield name, kind, shape, b"".join(pieces)


def _gguf(path: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    for name, tensor in open_gguf(path).tensors.items():
        data: Any = tensor.data.reshape(-1).view("u1")
        pieces = b"".join(data[offset : offset + length].tobytes() for offset, length in _pieces(data.size))
        yield name, tensor.tensor_type.name, tensor.shape.tolist(), pieces


def _pieces(size: int) -> list[tuple[int, int]]:
    """Offset and length of what is read of so many bytes."""
    if size <= PIECES * PIECE:
        return [(0, size)]
    return [(i * (size - PIECE) // (PIECES - 1), PIECE) for i in range(PIECES)]
