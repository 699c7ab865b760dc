"""bitsandbytes' NF4 on the CPU, written for bitsandbytes 0.48 and PyTorch 2.13.

    pip install torch bitsandbytes

Not offered: everything else; LoRA on these weights is PEFT's, and its optimisers need a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit

Array = np.ndarray
DTYPE = "float32"


def nf4_quantize(W: Array, block_size: int) -> tuple[Array, Array]:
    packed, state = quantize_4bit(
        torch.from_numpy(W), blocksize=block_size, quant_type="nf4", compress_statistics=False
    )
    two = packed.numpy().ravel()
    return np.stack([two >> 4, two & 15], axis=1).ravel(), state.absmax.numpy()


def nf4_dequantize(codes: Array, absmax: Array, block_size: int, shape: tuple[int, ...]) -> Array:
    pairs = codes.astype(np.uint8).reshape(-1, 2)
    state = QuantState(
        torch.from_numpy(absmax), torch.Size(shape), get_4bit_type("nf4", "cpu"), block_size, "nf4", torch.float32
    )
    W = dequantize_4bit(torch.from_numpy(pairs[:, 0] << 4 | pairs[:, 1])[:, None], state)
    return np.asarray(W.numpy())
