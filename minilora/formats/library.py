"""Several adapters on one base, by name.

Each is a Model of its own that shares the base's frozen weights, so to switch is to take another Model: nothing is
merged, copied or undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minilora.formats.adapters import load_adapter
from minilora.formats.files import read_json
from minilora.formats.hub import find_adapter
from minilora.formats.peft import CONFIG
from minilora.methods.fields import AdapterKeys
from minilora.model.model import Model

BASE = "base"  # the name of the model without any adapter


class Trained(NamedTuple):
    """The base that an adapter names as its own; empty where its folder does not say."""

    base: str
    revision: str

    def __str__(self) -> str:
        return f"{self.base}@{self.revision}" if self.revision else self.base

    def fits(self, other: Trained) -> bool:
        """Whether both may be of one base: what is not said is no contradiction, and a path may be written two ways."""
        same = not (self.base and other.base) or self.base == other.base
        same = same or (Path(self.base).exists() and Path(self.base).resolve() == Path(other.base).resolve())
        return same and (not (self.revision and other.revision) or self.revision == other.revision)


def trained_on(folder: Path) -> Trained:
    """The base that the folder's adapter_config.json names."""
    raw = read_json(folder / CONFIG, AdapterKeys)
    return Trained(raw.get("base_model_name_or_path") or raw.get("model") or "", raw.get("revision") or "")


def contradiction(folders: Mapping[str, Path]) -> str:
    """Two of the adapters that name different bases, in words; empty where all fit."""
    trained = {name: trained_on(folder) for name, folder in folders.items()}
    for name, one in trained.items():
        for other_name, other in trained.items():
            if not one.fits(other):
                return f"{name} was trained on {one}, {other_name} on {other}"
    return ""


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """The folders of adapters given as `NAME=ADAPTER` or `ADAPTER`, which is then named after its folder.

    ADAPTER is a folder or a hub id. ValueError where a name is used twice, or is that of the base.
    """
    folders: dict[str, Path] = {}
    for entry in given:
        name, equals, adapter = entry.partition("=")
        if not equals or Path(entry).exists():
            adapter = entry
            name = Path(entry).resolve().name if Path(entry).exists() else entry.partition("@")[0].rpartition("/")[2]
        if name in ("", BASE, *folders):
            reason = "is that of the model without adapters" if name == BASE else "is taken" if name else "is empty"
            raise ValueError(f"--adapter {entry}: the name {name!r} {reason}: choose one with --adapter NAME={adapter}")
        folders[name] = find_adapter(adapter).folder
    return folders


def load_adapters(base: Model, folders: Mapping[str, Path]) -> dict[str, Model]:
    """The base and the adapters on it, by name."""
    return {BASE: base} | {name: load_adapter(base, folder) for name, folder in folders.items()}
