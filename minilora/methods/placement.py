"""Where an adapter stands: the settings by which LoRA, DoRA and MiSS choose their modules, and PEFT's fields for them.

How names choose modules: methods/targets.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict

from minilora.keys import Between, shown
from minilora.methods.fields import check_patterns
from minilora.methods.method import Method
from minilora.methods.setting import setting
from minilora.methods.targets import (
    ALL_LINEAR,
    ModuleNames,
    is_named,
    names_or_expression,
    saved_module_names,
    target_module_names,
)
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import HEAD, LAYER, LINEAR, parameter_shapes
from minilora.model.sites import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:  # from Python 3.11 on
    from typing import Self

Layer: TypeAlias = Annotated[int, Between(0, 2**12)]


class PlacementKeys(TypedDict, total=False):
    """PEFT's fields, read by `read_placement`."""

    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: Layer | list[Layer]
    layers_pattern: str | list[str]
    modules_to_save: list[str]
    bias: str


@dataclass(frozen=True, kw_only=True)
class Placed(Method):
    """A method whose adapters stand at chosen modules; the fields mean what PEFT's mean.

    A module of `modules_to_save` is not adapted: a copy of it trains whole.
    """

    target_modules: ModuleNames = setting(
        (ALL_LINEAR,),
        "the modules to adapt, by name: q_proj v_proj, or all-linear",
        aliases=("lora_target_modules", "keys"),
        metavar="NAME",
    )
    exclude_modules: ModuleNames = setting((), "modules not to adapt, though a target matches them", metavar="NAME")
    num_layers: int = setting(0, "the number of last layers to adapt; 0: all layers", at_least=0)
    modules_to_save: tuple[str, ...] = setting(
        (),
        "modules to train whole, beside the adapter: norm lm_head",
        aliases=("lora_modules_to_save",),
        metavar="NAME",
    )
    layers_to_transform: tuple[int, ...] | None = None  # PEFT's field, which `num_layers` is worked out to

    def for_model(self, config: Config, encode: Callable[[str], list[int]]) -> Self:
        """With layers counted from the model's end, and a lone entry that is no name taken as a regular expression."""
        L = config.num_hidden_layers
        if self.num_layers > L:
            raise ValueError(f"--num-layers {self.num_layers}: the model has {L}")
        return replace(
            self,
            target_modules=names_or_expression(self.target_modules),
            exclude_modules=names_or_expression(self.exclude_modules),
            layers_to_transform=tuple(range(L - self.num_layers, L)) if self.num_layers else self.layers_to_transform,
            num_layers=0,
        )

    def adapted_modules(self, config: Config) -> list[str]:
        """The modules that get an adapter, in the model's order."""
        saved = saved_module_names(config, self.modules_to_save)
        targets = target_module_names(config, self.target_modules, self.exclude_modules, self.layers_to_transform)
        return [module for module in targets if module not in saved]


def frozen_site(model: Model, module: str) -> FrozenLinear | FrozenEmbedding:
    """The site at `module`, which has to be a plain frozen one: adapters are not stacked silently."""
    site = model.sites[module]
    if not isinstance(site, FrozenLinear | FrozenEmbedding):
        raise ValueError(f"{module} is already adapted: start from the base model")
    return site


def write_placement(method: Placed) -> dict[str, Any]:
    """PEFT's fields for these settings."""
    exclude = method.exclude_modules
    fields = {
        "target_modules": _written_targets(method.target_modules),
        "bias": "none",
        "modules_to_save": list(method.modules_to_save) or None,
        "layers_to_transform": None if method.layers_to_transform is None else list(method.layers_to_transform),
        "layers_pattern": None,
    }
    if exclude:  # old versions of PEFT raise on fields they do not know
        fields["exclude_modules"] = exclude if isinstance(exclude, str) else list(exclude)
    return fields


def _written_targets(targets: ModuleNames) -> str | list[str]:
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return targets
    written: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        # The seven names say the same as "all-linear", and to more versions of PEFT.
        written += [LAYER[role].rpartition(".")[2] for role in LINEAR] if target == ALL_LINEAR else [target]
    return list(dict.fromkeys(written))


def read_placement(place: object, raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The settings by name, from checked fields. ValueError, naming place and field, for what cannot be honoured."""
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{place}: bias {raw['bias']!r} is not supported, only 'none'")
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{place}: layers_pattern {raw['layers_pattern']!r} matches no layer of a Llama-style model")
    check_patterns(place, raw, "target_modules", "exclude_modules")
    layers, exclude = raw.get("layers_to_transform"), raw.get("exclude_modules", ())
    layers = [layers] if isinstance(layers, int) else layers
    return {
        "target_modules": _read_targets(place, raw, config),
        "exclude_modules": exclude if isinstance(exclude, str) else tuple(exclude),
        "layers_to_transform": tuple(layers) if layers else None,
        "modules_to_save": tuple(raw.get("modules_to_save", ())),
    }


def _read_targets(place: object, raw: Mapping[str, Any], config: Config) -> ModuleNames:
    targets = raw.get("target_modules", ["q_proj", "v_proj"])  # PEFT's choice for Llama
    if isinstance(targets, str):
        return (ALL_LINEAR,) if targets.lower() == ALL_LINEAR else targets
    known = [name.removesuffix(".weight") for name in parameter_shapes(config)] + [HEAD]
    # PEFT passes over names that match nothing, as long as one does.
    matching = tuple(entry for entry in targets if any(is_named(name, (entry,)) for name in known))
    if not matching:
        raise ValueError(f"{place}: target_modules {shown(targets)} matches no projection of the base model")
    return matching
