"""The word lists behind the generated text, from the files in `words/`: table names, column names and values.

The `HELD_OUT` lists share no word with the training lists, so that validation and test questions are about things that
no training question ever mentions.
"""

from pathlib import Path

from minilora.tasks.tables import read_words

_FOLDER = Path(__file__).with_name("words")

TABLES = read_words(_FOLDER / "tables.txt")
TEXT_COLUMNS = read_words(_FOLDER / "text_columns.txt")
NUMBER_COLUMNS = read_words(_FOLDER / "number_columns.txt")
VALUES = read_words(_FOLDER / "values.txt")

HELD_OUT_TABLES = read_words(_FOLDER / "held_out_tables.txt")
HELD_OUT_TEXT_COLUMNS = read_words(_FOLDER / "held_out_text_columns.txt")
HELD_OUT_NUMBER_COLUMNS = read_words(_FOLDER / "held_out_number_columns.txt")
HELD_OUT_VALUES = read_words(_FOLDER / "held_out_values.txt")

# General vocabulary of the pretraining stories and lists.
THINGS = read_words(_FOLDER / "things.txt")
PLACES = read_words(_FOLDER / "places.txt")
ADJECTIVES = read_words(_FOLDER / "adjectives.txt")
PEOPLE = read_words(_FOLDER / "people.txt")
