"""llama.cpp's server in a process of its own, for `measure`: prints its address, and ends when standard input does."""

from __future__ import annotations

import json
import sys
from typing import Any


def serve(model: str, adapters: list[str], rows: int, length: int, threads: int) -> None:
    """Serve a GGUF file with adapters, in `rows` slots of `length` tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.n_gpu_layers = rows, rows * length, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in adapters]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    serve(**given)
