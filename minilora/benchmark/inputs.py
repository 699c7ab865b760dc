"""The inputs of all sides of a case: checkpoints, adapters and rows, made in a scratch folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora.benchmark.job import JobRow, write_job_rows
from minilora.formats.checkpoint import read_config
from minilora.formats.known_configs import find_config
from minilora.formats.peft import write_adapter
from minilora.methods.lora import LoRA

TINY = {  # the model of the quick size
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Inputs(NamedTuple):
    """Makes each input once. The same seed gives the same bytes."""

    scratch: Path
    seed: int = 0

    def model(self, name: str, **changes: int) -> str:
        """The folder of a checkpoint: `name` itself if it is one, else random weights of that shape.

        They are written in bfloat16, as SmolLM's are, so that float32 and bfloat16 sides have the very same weights.
        Another process writes them, so that this one stays small: its children inherit its peak memory.
        """
        if Path(name).is_dir() and not changes:
            return name
        raw = (
            TINY if name == "tiny" else find_config(str(Path(name, "config.json")) if Path(name).is_dir() else name)[1]
        )
        folder = self.scratch / "-".join([Path(name).name, *(f"{key}-{value}" for key, value in changes.items())])
        if not folder.exists():
            config = self.scratch / f"{folder.name}.json"
            config.write_text(json.dumps({**raw, **changes}))
            command = [sys.executable, "-m", "minilora.random_checkpoint", str(config), "--out", str(folder)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"the random checkpoint {name} could not be made: {made.stderr.strip()}")
        return str(folder)

    def gguf(self, model: str, dtype: str) -> str:
        """The model as a GGUF file."""
        path = self.scratch / f"{Path(model).name}-{dtype}" / "model.gguf"
        if not path.exists():
            command = [sys.executable, "-m", "minilora.convert", "--model", model, "--format", "gguf", "--dtype", dtype]
            made = subprocess.run([*command, "--out", str(path)], capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"{model} could not be written as a GGUF file: {made.stderr.strip()}")
        return str(path)

    def adapter(self, model: str, rank: int, targets: tuple[str, ...]) -> str:
        """The folder of an adapter. B is not zero, so that a side that ignored it would have another loss."""
        config, _ = read_config(Path(model))
        folder = self.scratch / f"adapter-{Path(model).name}-{rank}-{'-'.join(targets)}"
        settings = LoRA(rank, 2.0 * rank, target_modules=targets)
        rng = np.random.default_rng(self.seed)
        shapes = settings.shapes(config)
        tensors = {name: rng.uniform(-0.02, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
        write_adapter(folder, settings, tensors, config, model)
        return str(folder)

    def rows(self, name: str, model: str, lengths: Sequence[int], prompts: Sequence[int]) -> str:
        """A file of rows of random tokens, with the length of each row and of its prompt."""
        config, _ = read_config(Path(model))
        rng = np.random.default_rng(self.seed)
        path = self.scratch / f"{name}.jsonl"
        rows = (rng.integers(1, config.vocab_size, length).tolist() for length in lengths)
        write_job_rows(path, [JobRow(tokens, prompt) for tokens, prompt in zip(rows, prompts, strict=True)])
        return str(path)
