"""All commands by name: `python -m minilora` lists them, and `minilora train …` is `python -m minilora.train …`."""

from __future__ import annotations

import importlib
import sys

from minilora.cli.parser import any_terminal, did_you_mean

COMMANDS = {
    "train": "fine-tune a model on your rows, judged before and after",
    "evaluate": "loss, perplexity, exact match and drift of a model or an adapter",
    "generate": "continue prompts",
    "chat": "talk with a model, and switch between its adapters",
    "serve": "answer over HTTP as OpenAI's interface does, with several adapters in one batch",
    "serve.measure": "tokens/s of the server, rows together and one by one, beside llama.cpp's",
    "report": "the page of a run made anew, or of several runs compared",
    "merge": "write base and adapter as one model",
    "combine": "add several adapters up to one",
    "convert": "write an adapter or a model in another tool's format",
    "plan": "count the memory and the arithmetic of a run before it begins",
    "plan.scale": "how a step scales to 1,024 ranks, as a table and a picture",
    "compare": "every method on the same work: a table and plots",
    "benchmark": "time and memory beside transformers + PEFT",
    "benchmark.ranks": "time and memory of training on ranks beside threads",
    "book": "docs/ as a site, each equation beside its function",
    "random_checkpoint": "a checkpoint of a real shape with random weights",
    "pretrain": "make the small base model that is shipped here",
    "rows.wordnet": "rows from WordNet: a noun's definition and its class",
    "rows.docstrings": "rows from Python's own library: a function and its summary",
}


def main(argv: list[str] | None = None) -> int:
    any_terminal()
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: minilora COMMAND [flags]     (or python -m minilora COMMAND; COMMAND --help tells its flags)\n")
        print(*(f"  {command:20}{what}" for command, what in COMMANDS.items()), sep="\n")
        return 0
    if name.replace("-", "_") not in COMMANDS:
        advice = did_you_mean(name, COMMANDS) or f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}: {advice}", file=sys.stderr)
        return 2
    place = f"minilora.{name.replace('-', '_')}"
    module = importlib.import_module(place)
    if hasattr(module, "__path__"):  # a room of its own, as minilora.plan
        module = importlib.import_module(f"{place}.__main__")
    code: int = module.main(flags)
    return code


if __name__ == "__main__":
    sys.exit(main())
