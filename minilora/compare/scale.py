"""The figures of large models, by arithmetic: nothing of that size is allocated."""

from __future__ import annotations

from typing import NamedTuple

from minilora.compare.figures import ARRAYS_OF_UPDATE
from minilora.formats.known_configs import GPT_3, KNOWN_CONFIGS
from minilora.formats.sizes import numbers
from minilora.methods.lora import LoRA
from minilora.model.config import Config
from minilora.model.names import parameter_count, parameter_shapes

FLOAT32 = 4  # bytes


class AtGPT3(NamedTuple):
    d: int
    fewer: dict[int, float]  # rank → all parameters / parameters that LoRA trains
    full_bytes: int  # float32: weights, gradients, AdamW's m and v
    lora_bytes: int  # the same, with gradients and moments of A and B at rank 4 only


def at_gpt_3() -> AtGPT3:
    """LoRA on q and v of a Llama of GPT-3's width, depth and size (Brown et al., 2020, arXiv:2005.14165, table 2.1)."""
    config = Config.from_dict(GPT_3)
    N, M = (numbers(shapes) for shapes in (parameter_shapes(config), qv_lora(4).shapes(config)))
    return AtGPT3(
        config.hidden_size,
        {r: N / numbers(qv_lora(r).shapes(config)) for r in (1, 2, 4)},
        full_bytes=FLOAT32 * (N + ARRAYS_OF_UPDATE * N),
        lora_bytes=FLOAT32 * (N + M + ARRAYS_OF_UPDATE * M),
    )


def qv_lora(rank: int) -> LoRA:
    """The paper's LoRA, on q and v."""
    return LoRA(rank=rank, target_modules=("q_proj", "v_proj"))


def lora_share(model: str, rank: int, targets: tuple[str, ...]) -> float:
    """The share of a known model's parameters that LoRA trains."""
    config = Config.from_dict(KNOWN_CONFIGS[model])
    return numbers(LoRA(rank=rank, target_modules=targets).shapes(config)) / parameter_count(config)
