"""What a method trains and how large its files are, from shapes alone: no array is made, whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from minilora.formats.checkpoint import named_dtype
from minilora.formats.files import Shape
from minilora.formats.peft import PREFIX, adapter_shapes
from minilora.methods import Method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import NAMES, Bottleneck
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.targets import projections, saved_module_names
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.methods.whole_modules import Modules
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, layer_module, parameter_shapes

SPELT = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by safetensors


def numbers(shapes: Mapping[str, Shape]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(math.prod, shapes.values()))


def trainable_shapes(method: Method, config: Config) -> dict[str, Shape]:
    """Name and shape of everything that `method.start` makes. ValueError for a method that is not known here."""
    weights = parameter_shapes(config)
    weights.setdefault(f"{HEAD}.weight", weights[f"{EMBED}.weight"])
    D, layers = config.hidden_size, range(config.num_hidden_layers)
    match method:
        case LoRA():
            return adapter_shapes(config, method)
        case Full():
            return parameter_shapes(config)
        case PrefixTuning(n):
            return {EMBEDDINGS: (n, 2 * len(layers) * config.num_key_value_heads * config.head_dim)}
        case PromptTuning(n):
            return {EMBEDDINGS: (n, D)}
        case Modules(names):
            saved = saved_module_names(config, names)
            return {name: shape for name, shape in weights.items() if name.rpartition(".")[0] in saved}
        case BitFit(norms):
            biases = {f"{name}.bias": weights[f"{name}.weight"][:1] for name in projections(config)}
            return biases | {name: shape for name, shape in weights.items() if norms and len(shape) == 1}
        case Bottleneck(m):
            places = [layer_module(layer, role) for layer in layers for role in ("o", "down")]
            shapes = dict(zip(NAMES, ((m, D), (m,), (D, m), (D,)), strict=True))
            return {f"{place}.{name}": shape for place in places for name, shape in shapes.items()}
        case RandomSubset(share):
            sizes = {name: math.prod(weights[f"{name}.weight"]) for name in projections(config)}
            return {f"{name}.values": (max(1, round(share * size)),) for name, size in sizes.items()}
    raise ValueError(f"{type(method).__name__}: it is not known what it trains")


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
    if isinstance(method, LoRA) and method.init == "pissa":  # written as a change of W, of twice the rank (docs: L21)
        doubled = {name: 2 * rank for name, rank in method.rank_pattern.items()}
        method = replace(method, init="kaiming", rank=2 * method.rank, rank_pattern=doubled)
    shapes = trainable_shapes(method, config)
    if isinstance(method, LoRA):
        shapes = {PREFIX + name: shape for name, shape in shapes.items()}
    peft = isinstance(method, LoRA | Full | PrefixTuning | PromptTuning)
    return file_bytes(shapes, dtype, {"format": "pt"} if peft else None)


def checkpoint_bytes(config: Config, dtype: str) -> int:
    """A whole model in one file."""
    return file_bytes(parameter_shapes(config), dtype, {"format": "pt"})
