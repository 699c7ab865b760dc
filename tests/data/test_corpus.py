"""The pretraining corpus: deterministic, bounded, free of SQL and of the held-out phrasings."""

import random
import re
from itertools import islice

import pytest

from minilora.pretrain.corpus import GENERATORS, MAX_DOCUMENT, english_documents, python_documents
from minilora.pretrain.notes import NoteFormat, fresh_names, notes
from minilora.tasks.nl2sql.phrasings import HELD_OUT
from minilora.tasks.nl2sql.pseudo_words import pseudo_word

DOCUMENTS = list(islice(english_documents(5), 3000))
# Every keyword of the task: none occurs in capitals, and no statement in any case.
KEYWORDS = re.compile(r"\b(SELECT|DISTINCT|FROM|WHERE|AND|GROUP|ORDER|BY|LIMIT|ASC|DESC|COUNT|AVG|MIN|MAX|SUM)\b")
STATEMENT = re.compile(r"\bselect\b[^\n]*\bfrom\b", re.IGNORECASE)


def test_a_seed_gives_one_stream_and_another_seed_another() -> None:
    assert list(islice(english_documents(5), 100)) == DOCUMENTS[:100]
    assert not set(islice(english_documents(6), 100)) & set(DOCUMENTS)


def test_english_contains_no_sql() -> None:
    for document in DOCUMENTS:
        assert not KEYWORDS.search(document), document
        assert not STATEMENT.search(document), document


def test_english_documents_are_paragraphs_that_do_not_repeat() -> None:
    assert len(set(DOCUMENTS)) == len(DOCUMENTS)
    lengths = [len(document) for document in DOCUMENTS]
    assert min(lengths) >= 40 and max(lengths) <= MAX_DOCUMENT
    assert 300 < sum(lengths) / len(lengths) < 900
    assert all(document == document.strip() for document in DOCUMENTS)


def test_held_out_phrasings_stay_out_of_the_english() -> None:
    beginnings = {opener.split("{x}")[0] for opener in HELD_OUT.openers}
    assert len(beginnings) > 4
    for document in DOCUMENTS:
        assert not any(beginning in document for beginning in beginnings), document


@pytest.mark.parametrize("generator", [generator for generator, _ in GENERATORS])
def test_generators_depend_on_nothing_but_their_random_numbers(generator) -> None:  # type: ignore[no-untyped-def]
    documents = [generator(random.Random(seed)) for seed in range(20)]
    assert documents == [generator(random.Random(seed)) for seed in range(20)]
    assert len(set(documents)) == 20
    assert not any("{" in document for document in documents)  # every slot was filled


def test_a_document_of_notes_shows_its_format_more_than_once() -> None:
    for seed in range(50):
        assert len(re.findall(r"\b(?:Request|Question|Task|Ask|Wish|Q):", notes(random.Random(seed)))) >= 2


def test_note_formats_are_many() -> None:
    formats = [NoteFormat(random.Random(seed)) for seed in range(200)]
    assert len({(f.part, f.separator, f.quote, f.call, *f.labels.values()) for f in formats}) > 190


def test_fresh_names_repeat_no_column() -> None:
    rng = random.Random(0)
    for _ in range(500):
        names = fresh_names(rng)
        columns = names.text_columns + names.number_columns
        assert len(set(columns)) == len(columns)


def test_pseudo_words_are_words_and_many() -> None:
    rng = random.Random(0)
    made = {pseudo_word(rng) for _ in range(2000)}
    assert len(made) > 1000 and all(re.fullmatch(r"[a-z]{2,}", word) for word in made)


def test_python_documents_are_bounded_and_deterministic() -> None:
    documents = list(islice(python_documents(), 1500))
    assert documents == list(islice(python_documents(), 1500))
    assert all(0 < len(document) <= MAX_DOCUMENT and document.strip() for document in documents)
    assert not any(re.search(r"\bSELECT\b", document) for document in documents)
    assert sum("def " in document for document in documents) > 100
