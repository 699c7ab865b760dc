"""Read the golden files with nothing but NumPy. As a script, it recomputes a case: LoRA beside a linear map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "U16": "<u2", "U8": "<u1"}


def header_and_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A safetensors file: 8 bytes with the header's length, the header in JSON, and the bytes it points into."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    entries = {name: (e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items() if name[:2] != "__"}
    return header, {
        name: np.frombuffer(raw[start + first : start + end], DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, first, end) in entries.items()
    }


def read_json(path: Path) -> dict[str, np.ndarray]:
    """The same from the twin in JSON."""
    entries = {name: e for name, e in json.loads(path.read_text(encoding="utf-8")).items() if name[:2] != "__"}
    return {name: np.array(e["data"], DTYPES[e["dtype"]]).reshape(e["shape"]) for name, e in entries.items()}


if __name__ == "__main__":
    _, case = header_and_arrays(Path(__file__).parent / "laws" / "lora_linear.safetensors")
    x, W, A, B, dy = (case[name] for name in ("x", "W", "A", "B", "dy"))
    s = case["alpha"] / len(A)
    ours = {"s": s, "y": x @ W.T + s * (x @ A.T) @ B.T, "merged": W + s * B @ A}
    ours |= {"dx": dy @ (W + s * B @ A), "dA": s * (dy @ B).T @ x, "dB": s * dy.T @ (x @ A.T)}
    largest = max(float(abs(array - case[name]).max()) for name, array in ours.items())
    print(f"lora_linear: {', '.join(ours)} within {largest:.1e}")
    raise SystemExit(largest > 1e-12)
