"""The interface of a method, which every file of this folder fills in, and how the files are found.

A method is a small frozen dataclass of its settings. It never edits the model; it makes a new one through one of three
seams: other sites at named places, keys and values before every example, or embeddings before every example. All that
is to be known of a method stands in its file. Nothing else lists them: whatever class is defined in a file of this
folder is found by `known_methods`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from minilora.backend import Array
from minilora.keys import shown
from minilora.methods import fields
from minilora.methods.setting import check, settings_of
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import Shape

if TYPE_CHECKING:  # from Python 3.11 on
    from typing import Self

HostArrays: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"


class Variant(NamedTuple):
    """A variant of a method in comparisons: its name in tables, the settings it has, and the rates it is tried with."""

    name: str
    what: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...]


class Method:
    """The base of all methods: what a file has to say (`shapes`, `start`, `attach`), and defaults for the rest."""

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # for `--method`, each with the settings it stands for
    switch: ClassVar[str] = ""  # another tool's flag that asks for this method, such as use_dora
    peft_type: ClassVar[str] = ""  # in adapter_config.json
    key_prefix: ClassVar[str] = ""  # what stands before each tensor's name in the adapter's file
    mlx_type: ClassVar[str] = ""  # mlx-lm's fine_tune_type, for what that format can hold
    rivals: ClassVar[tuple[Variant, ...]] = ()

    freezes_base: ClassVar[bool] = True  # what is left is an adapter of a frozen base; else it is a whole model
    multiplies_frozen: ClassVar[bool] = True  # products with frozen weights exist, and may be in 16 bits
    thin_change: ClassVar[bool] = False  # the change of each weight is a product s B A, so that changes can be added

    def __post_init__(self) -> None:
        check(self)

    @property
    def virtual_tokens(self) -> int:
        """How many positions the method puts before every example."""
        return 0

    @property
    def name(self) -> str:
        """The name by which `--method` asks for it."""
        fitting = (
            name for name, given in self.names.items() if all(getattr(self, k, v) == v for k, v in given.items())
        )
        return next(fitting, next(iter(self.names)))

    def for_model(self, config: Config, encode: Callable[[str], list[int]]) -> Self:
        """The method with whatever depends on the model worked out: layers from its end, words as tokens."""
        return self

    def shapes(self, config: Config) -> dict[str, Shape]:
        """Name and shape of everything that trains on a model of this configuration."""
        raise NotImplementedError

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Everything that trains, by name, as it is before the first step: the model then computes what it did.

        With virtual tokens it cannot, and computes what it did after reading some words.
        """
        raise NotImplementedError

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model that trains. It shares the arrays of `trainable`: updating those in place changes it."""
        raise NotImplementedError

    def rate_factors(self, names: Iterable[str]) -> dict[str, float]:
        """By name, what a parameter's learning rate is multiplied by; those that are not named keep it."""
        return {}

    def saved_form(self, adapted: Model, tensors: HostArrays) -> tuple[Method, dict[str, np.ndarray[Any, Any]]]:
        """The adapter as it is written: one that computes the same on the base itself, for every reader."""
        return self, dict(tensors)

    def saved_shapes(self, config: Config) -> dict[str, Shape]:
        """Name and shape of the tensors of `saved_form`."""
        return self.shapes(config)

    def fields(self, config: Config) -> dict[str, Any]:
        """The fields of adapter_config.json beside those of every adapter."""
        return {one.saved_as: getattr(self, name) for name, one in settings_of(type(self)).items()}

    @classmethod
    def is_held_by(cls, raw: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json with these fields holds this method."""
        return bool(cls.peft_type) and raw.get("peft_type") == cls.peft_type

    @classmethod
    def from_fields(cls, place: object, raw: Mapping[str, Any], config: Config) -> Self:
        """The method of an adapter_config.json. ValueError, naming `place` and field, for what it cannot honour."""
        declared = settings_of(cls)
        fields.refuse_unknown(place, raw, {one.saved_as for one in declared.values()})
        return cls(**{name: fields.value(place, raw, one) for name, one in declared.items()})


@cache
def known_methods() -> dict[str, type[Method]]:
    """Every method, under each of its names."""
    package = import_module("minilora.methods")
    methods: dict[str, type[Method]] = {}
    for file in pkgutil.iter_modules(package.__path__, "minilora.methods."):
        for entry in vars(import_module(file.name)).values():
            if isinstance(entry, type) and issubclass(entry, Method) and entry.__module__ == file.name:
                methods |= dict.fromkeys(entry.names, entry)
    return methods


def method_held_by(place: object, raw: Mapping[str, Any]) -> type[Method]:
    """The method that an adapter_config.json holds. ValueError for a kind that is not known here."""
    classes = dict.fromkeys(known_methods().values())
    for method in classes:
        if method.is_held_by(raw):
            return method
    known = ", ".join(sorted({method.peft_type for method in classes if method.peft_type}))
    raise ValueError(f"{place}: peft_type {shown(raw.get('peft_type'))} is not supported, only {known}")
