"""The base of an adapter: the model that the user names, or else the one that the adapter's folder names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from minilora.formats.fingerprint import fingerprint
from minilora.formats.hub import Source, find_model, is_hub_id
from minilora.formats.library import Trained, contradiction, trained_on
from minilora.formats.load import SHIPPED_MODEL
from minilora.runs.folder import read_summary


def find_base(model: str, revision: str, adapters: Mapping[str, Path]) -> Source:
    """`--model` if it is given; else the base that the adapters name, which is told; else tinysmol.

    `adapters` are folders by name. FileNotFoundError or ValueError where their base is not here, not said or not one.
    """
    different = contradiction(adapters)
    if model or not adapters:
        source = find_model(model or str(SHIPPED_MODEL), revision)
        if different:
            print(f"remark: {different}", file=sys.stderr)
        tell_of_other_bases(source, adapters)
        return source
    if different:
        raise ValueError(f"{different}: choose one with --model")
    name, trained = next(
        ((name, said) for name, folder in adapters.items() if (said := trained_on(folder)).base), ("", Trained("", ""))
    )
    if not name:
        raise ValueError(
            f"{', '.join(map(str, adapters.values()))} does not say which base it belongs to: give --model"
        )
    base = _here(trained.base)
    try:
        source = find_model(base, revision or (trained.revision if is_hub_id(base) else ""))
    except FileNotFoundError as error:
        reason = str(error).partition(": ")[2]
        raise FileNotFoundError(
            f"{adapters[name]} was trained on {trained}, which is not here ({reason}): name its place with --model"
        ) from error
    print(f"base: {trained}, which {adapters[name]} names", file=sys.stderr)
    tell_of_other_bases(source, adapters)
    return source


def tell_of_other_bases(source: Source, adapters: Mapping[str, Path]) -> None:
    """A remark for each adapter that was trained on other weights, though the shapes may fit: a run's folder knows."""
    known = {folder: read_summary(folder).get("base_fingerprint") for folder in adapters.values()}
    found = fingerprint(source.folder) if any(known.values()) else None
    for folder, expected in known.items():
        if expected and expected != found:
            print(
                f"remark: {folder} was trained on a base with other weights, or in another dtype, than {source.name}",
                file=sys.stderr,
            )


def _here(base: str) -> str:
    """The base's name; tinysmol is found wherever minilora is installed."""
    return str(SHIPPED_MODEL) if not Path(base).exists() and Path(base).name == SHIPPED_MODEL.name else base
