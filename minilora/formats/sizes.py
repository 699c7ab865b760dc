"""The sizes of files and of trainable arrays, from shapes alone: no array is made, whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from minilora.formats.checkpoint import named_dtype
from minilora.methods.method import Method
from minilora.model.config import Config
from minilora.model.names import Shape, parameter_shapes

SPELT = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by safetensors


def numbers(shapes: Mapping[str, Shape]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(math.prod, shapes.values()))


def file_bytes(shapes: Mapping[str, Shape], dtype: str, metadata: Mapping[str, str] | None = None) -> int:
    """The length of a safetensors file: 8 bytes, a header in JSON filled up to a multiple of 8, and the numbers.

    The library orders tensors by name, and says of each where it begins and ends among the numbers.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    itemsize, end = named_dtype(dtype).itemsize, 0
    for name in sorted(shapes):
        begin, end = end, end + itemsize * math.prod(shapes[name])
        header[name] = {"dtype": SPELT[dtype], "shape": shapes[name], "data_offsets": [begin, end]}
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + end


def saved_bytes(method: Method, config: Config, dtype: str) -> int:
    """`adapter_model.safetensors` of such a method; after full fine-tuning, `model.safetensors`."""
    shapes = method.saved_shapes(config)
    return file_bytes({method.key_prefix + name: shape for name, shape in shapes.items()}, dtype, {"format": "pt"})


def checkpoint_bytes(config: Config, dtype: str) -> int:
    """A whole model in one file."""
    return file_bytes(parameter_shapes(config), dtype, {"format": "pt"})
