"""The commands of minilora as modules, for tests that call them in their own process."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest


def command_module(command: str) -> Any:
    """What `python -m minilora.COMMAND` runs: a file, or a package's `__main__`."""
    module = importlib.import_module(f"minilora.{command}")
    return importlib.import_module(f"minilora.{command}.__main__") if hasattr(module, "__path__") else module


REPOSITORY = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"
RUN_FILES = {
    ADAPTER, "adapter_config.json", "settings.json", "metrics.jsonl", "summary.json", "loss.png", "state.safetensors",
    "report.json", "report.html",
}  # fmt: skip
SUMMARY_KEYS = {
    "base_loss", "adapted_loss", "base_exact_match", "adapted_exact_match", "drift_kl", "trainable_parameters",
    "total_parameters", "tokens_per_second", "seconds", "peak_memory_bytes",
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TEXTS = [f"{a} and {b} are {c}." for a in ("one", "two", "six") for b in ("four", "five") for c in ("odd", "even")]
PAIRS = [{"prompt": f"{word} ->", "completion": f" {word.upper()}"} for word in ("up", "down", "left", "right", "on")]
CHATS = [[{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}] for p in PAIRS]
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "pairs": PAIRS,
    "messages": [{"messages": chat} for chat in CHATS],
    "chat-pairs": [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(command: str, *flags: object) -> Result:
    """A command in this process, as `python -m minilora.COMMAND FLAGS` runs it."""
    out, err = io.StringIO(), io.StringIO()
    module = command_module(command)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [command, *map(str, flags)])
        try:
            code = module.main()
        except SystemExit as error:  # argparse's own complaints
            code = error.code
    return Result(code, out.getvalue(), err.getvalue())


def good(command: str, *flags: object) -> str:
    """What the command prints when all goes well."""
    result = run(command, *flags)
    assert result.code == 0, result.err
    return result.out


def process(command: str, *flags: object, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, which an interrupt reaches."""
    argv = [sys.executable, "-m", f"minilora.{command}", *map(str, flags)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    hears: dict[str, Any] = {} if os.name == "nt" else {"preexec_fn": hear_interrupts}
    return subprocess.Popen(argv, cwd=REPOSITORY, text=True, **(pipes | hears | options))


def hear_interrupts() -> None:
    """Signals reach this process, whatever its parent ignores or blocks: nohup, or a shell's background job."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def assert_refused(result: Result, *named: str) -> None:
    """Exit code 2 and one line that names what to mend, without a traceback."""
    assert result.code == 2
    complaint = [line for line in result.err.splitlines() if "error: " in line]
    assert len(complaint) == 1 and result.err.endswith(complaint[0] + "\n")
    assert "Traceback" not in result.err
    for name in named:
        assert name in complaint[0]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
