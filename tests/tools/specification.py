"""Write docs/specification.md: the laws of tests/specification as sentences, each with its reason.

python tests/tools/specification.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "specification.md"
CHAPTERS = sorted((ROOT / "tests" / "specification").glob("test_*.py"))
LAWS = sorted((ROOT / "tests" / "specification" / "laws").glob("test_*.py"))  # for everybody's implementation
SECTION = re.compile(r"^# --- (.*) ---$")
NAMES = {
    "adafactor": "Adafactor", "adafactors": "Adafactor's", "adamw": "AdamW", "adamws": "AdamW's", "bitfit": "BitFit",
    "dora": "DoRA", "doras": "DoRA's", "kaiming": "Kaiming", "lion": "Lion", "llama3": "Llama 3", "lora": "LoRA",
    "loraplus": "LoRA+",
    "miss": "MiSS", "mlp": "MLP", "nf4": "NF4", "peft": "PEFT", "pefts": "PEFT's", "pissa": "PiSSA",
    "pytorch": "PyTorch", "pytorchs": "PyTorch's", "rmsnorm": "RMSNorm", "rope": "RoPE", "rslora": "rsLoRA",
    "sgd": "SGD", "silu": "SiLU", "swiglu": "SwiGLU",
}  # fmt: skip
TITLES = {
    "golden": "Golden values", "golden laws": "Golden values of single laws", "parts": "Parts of a batch",
    "kit": "The kit", "prefix prompt": "Prefix and prompt tuning",
}  # fmt: skip
HEAD = """# The specification

What an implementation of LoRA, and of the model beneath it, must satisfy. Each law is a test's name, read without its
underscores, and leads to the file that has the test; the words behind it are the reason, or what is meant exactly. A
law marked ∀ holds *for all* inputs of a kind: [Hypothesis](https://hypothesis.readthedocs.io) draws them, and a failure
is shrunk to a small example. How gradients are checked to ten digits, and what the tests call, is in
[testing.md](testing.md).

`pytest tests/specification` tries all of them, with NumPy and Hypothesis alone. This page is made from the tests by
`python tests/tools/specification.py`."""

DOOR = """# The laws for everybody's implementation

The laws below know nothing of minilora. `pytest tests/specification --implementation FILE.py` holds them against any
code that offers the functions of [the template](../tests/specification/implementations/template.py), minilora's own
among them: [how](testing.md#the-laws-held-against-your-implementation)."""


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD, *map(chapter, CHAPTERS), DOOR, *map(chapter, LAWS)]) + "\n"


def chapter(path: Path) -> str:
    """A file's docstring, and its laws under the headings of its sections."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    headings = {i: found[1] for i, line in enumerate(text.splitlines()) if (found := SECTION.match(line))}
    title = re.sub(r"^test_(laws_)?\d+_", "", path.stem).replace("_", " ")
    title = TITLES.get(title, spelt(title)) + ": laws for everybody" * (path in LAWS)
    parts = [f"## {title}", one_line(ast.get_docstring(tree))]
    lines: list[str] = []
    for node in tree.body:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        passed = [i for i in headings if i < node.lineno]
        if passed:
            lines.append(f"\n### {escaped(headings[passed[-1]])}\n")
            for i in passed:
                del headings[i]
        lines.append(law(node, path))
    return "\n\n".join([*parts, "\n".join(lines).strip("\n")])


def law(test: ast.FunctionDef, path: Path) -> str:
    """One law: its statement as a link to its file, and its reason."""
    for_all = any("given" in ast.unparse(decorator).split("(")[0] for decorator in test.decorator_list)
    statement = spelt(test.name.removeprefix("test_").replace("_", " "))
    reason = one_line(ast.get_docstring(test))
    return f"- {'∀ ' * for_all}[{statement}](../{path.relative_to(ROOT).as_posix()}).{' ' * bool(reason)}{reason}"


def one_line(docstring: str | None) -> str:
    return escaped(" ".join((docstring or "").split()))


def escaped(words: str) -> str:
    """What Markdown would take for emphasis, a link or a formula stands as it is; code stays as it is too."""
    pieces = re.split(r"(`[^`]*`)", words)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_$<\[\]|])", r"\\\1", piece) for piece in pieces)


def spelt(words: str) -> str:
    """A name in lower case as a sentence: proper names as they are written, the first letter upper case."""
    sentence = " ".join(NAMES.get(word, word) for word in words.split())
    return sentence if sentence[1:2].isupper() else sentence[0].upper() + sentence[1:]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
