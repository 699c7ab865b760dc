"""What PEFT and transformers write down of a run is a file of settings here: no key of theirs is unknown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from minilora.cli.flags import by_setting, ours
from minilora.cli.foreign import is_foreign
from minilora.cli.train_flags import choose_settings, parse
from minilora.runs.settings import all_settings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_a_configuration_that_peft_saves_means_here_what_it_means_there(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, rank_pattern={"q_proj": 2})
    config.save_pretrained(tmp_path)
    flags = "--rank 4 --alpha 6 --dropout 0.1 --rslora --rank-pattern q_proj=2 --target-modules q_proj v_proj".split()
    assert choose_settings(parse(["-c", str(tmp_path / "adapter_config.json")])) == choose_settings(parse(flags))


def test_every_argument_of_transformers_is_known_and_its_default_is_no_obstacle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {*all_settings(), *ours(), "out"}
    defaults = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    assert [name for name in defaults if name not in known and not is_foreign(name)] == []
    foreign = {name: json.loads(json.dumps(value, default=str)) for name, value in defaults.items() if is_foreign(name)}
    assert by_setting(foreign, Path("run.yaml")) == {} and capsys.readouterr().err.count("\n") == 1
