"""What users bring from mlx-lm, TRL and PEFT is understood: names of flags, config files, units that differ."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import Result, assert_refused, command_module, run

from minilora.cli.flags import NEEDLESS, OTHER_COMMANDS, TO_TRAIN
from minilora.cli.train_flags import choose_settings, parse
from minilora.methods.setting import flag
from minilora.runs.settings import Settings, all_settings

TRAIN = [  # theirs, and how it is said here
    ("--model-name-or-path some/model", "--model some/model"),
    ("--model some/model --model-revision v1", "--model some/model --revision v1"),
    ("--dataset-name rows.jsonl", "--data rows.jsonl"),
    ("--dataset-text-field body", "--text-feature body"),
    ("--mask-prompt", "--train-on last-turn"),
    ("--completion-only-loss false", "--train-on everything"),
    ("--assistant-only-loss false", "--train-on everything"),
    ("--fine-tune-type full", "--method full"),
    ("--fine-tune-type dora", "--method dora"),
    ("--use-peft --use-dora", "--method dora"),
    ("--lora-r 4", "--rank 4"),
    ("--lora-alpha 64", "--alpha 64"),
    ("--scale 20 --rank 4", "--alpha 80 --rank 4"),
    ("--lora-scale 20", "--alpha 160"),
    ("--scale 5 --rank 4 --use-rslora", "--alpha 10 --rank 4 --rslora"),
    ("--load-in-4bit", "--frozen nf4"),
    ("--load-in-4bit false", "--frozen widened"),
    ("--prompt-tuning-init-text hello --method prompt", "--init-text hello --method prompt"),
    ("--lora-dropout 0.1", "--dropout 0.1"),
    ("--lora-target-modules q_proj v_proj", "--target-modules q_proj v_proj"),
    ("--keys self_attn.q_proj", "--target-modules self_attn.q_proj"),
    ("--num-layers 3", "--num-layers 3"),
    ("--num-layers -1", "--num-layers 0"),
    ("--lora-modules-to-save lm_head", "--modules-to-save lm_head"),
    ("--init-lora-weights gaussian", "--init gaussian"),
    ("--init-lora-weights true", "--init kaiming"),
    ("--resume-adapter-file some/folder/adapters.safetensors", "--adapter some/folder"),
    ("--iters 30 --grad-accumulation-steps 1", "--steps 30 --grad-accumulation 1"),
    ("--iters 31 --grad-accumulation-steps 4", "--steps 7 --grad-accumulation 4"),
    ("--steps-per-eval 10 --grad-accumulation-steps 1", "--eval-every 10 --grad-accumulation 1"),
    ("--steps-per-eval 10 --grad-accumulation-steps 4", "--eval-every 2 --grad-accumulation 4"),
    ("--max-steps 30", "--steps 30"),
    ("--max-steps -1", "--steps 0"),
    ("--num-train-epochs 2", "--epochs 2"),
    ("--per-device-train-batch-size 2", "--batch-size 2"),
    ("--gradient-accumulation-steps 4", "--grad-accumulation 4"),
    ("--lr 1e-4", "--learning-rate 1e-4"),
    ("--optim sgd", "--optimizer sgd"),
    ("--optim adamw_torch", "--optimizer adamw"),
    ("--optim paged_adamw_32bit", "--optimizer adamw"),
    ("--optim adamw_bnb_8bit", "--optimizer adamw_8bit"),
    ("--optim adamw_8bit", "--optimizer adamw_8bit"),
    ("--optim paged_adamw_8bit", "--optimizer adamw_8bit"),
    ("--optim adafactor", "--optimizer adafactor"),
    ("--optim lion_32bit", "--optimizer lion"),
    ("--optim paged_lion_32bit", "--optimizer lion"),
    ("--lr-scheduler-type linear", "--schedule linear"),
    ("--lr-scheduler-type constant_with_warmup", "--schedule constant"),
    ("--warmup-steps 7", "--warmup 7"),
    ("--warmup-ratio 0.5", "--warmup 0.5"),
    ("--max-seq-length 99", "--max-length 99"),
    ("--grad-checkpoint", "--activation-checkpointing"),
    ("--gradient-checkpointing True", "--activation-checkpointing"),
    ("--gradient-checkpointing false", ""),
    ("--eval-steps 5", "--eval-every 5"),
    ("--early-stopping-patience 3", "--patience 3"),
    ("--save-steps 9", "--save-every 9"),
    ("--bf16", "--mixed-precision bf16"),
    ("--fp16 True --bf16 False", "--mixed-precision fp16"),
    ("--bf16 false", ""),
    ("--mixed-precision false", ""),
    ("--adapter-path here", "--out here"),
    ("--output-dir here", "--out here"),
    ("--resume-from-checkpoint old", "--resume old"),
]
OTHERS = [
    ("generate", "--model-name-or-path a/b --model-revision v1", "--model a/b --revision v1"),
    ("generate", "--adapter-path run --max-new-tokens 9 --temperature 0.5", "--adapter run --max-tokens 9 --temp 0.5"),
    ("merge", "--adapter-path run --save-path new", "--adapter run --out new"),
    ("merge", "--adapter-path run --output-dir new", "--adapter run --out new"),
    ("evaluate", "--dataset-name rows.jsonl --max-seq-length 9", "--data rows.jsonl --max-length 9"),
    ("evaluate", "--per-device-eval-batch-size 3", "--batch-size 3"),
]
MLX_CONFIG = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    weight_decay: 0.05
data: "rows.jsonl"
seed: 7
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""
SAME_IN_FLAGS = """
    --model mlx_model --data rows.jsonl --seed 7 --batch-size 4 --steps 1000 --learning-rate 0.00001 --eval-every 200
    --out adapters --save-every 100 --max-length 2048 --target-modules self_attn.q_proj self_attn.v_proj --rank 8
    --alpha 160 --weight-decay 0.05
"""
MLX_SCHEDULE = """
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [2e-4, 1000, 1e-7]
"""


def written(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def meaning(line: str) -> tuple[Settings, Path, bool]:
    """What train makes of a command line: the settings, the run's folder, and whether it is resumed."""
    return choose_settings(parse(shlex.split(line)))


def refused(line: str, *named: str) -> None:
    result: Result = run("train", *shlex.split(line))
    assert_refused(result, *named)
    assert not Path("runs").exists()


# --- Names of flags ---


@pytest.mark.parametrize(("theirs", "ours"), TRAIN)
def test_a_familiar_flag_of_train_means_what_it_means_at_home(
    theirs: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilora.cli.train_flags.read_settings", lambda folder: folder)  # for --resume
    assert meaning(theirs) == meaning(ours)
    assert meaning(re.sub(r"(?<=[a-z])-(?=[a-z])", "_", theirs)) == meaning(ours)
    assert (meaning(theirs) == meaning("")) == (
        ours in ("", "--init kaiming", "--optimizer adamw", "--frozen widened", "--num-layers 0")
    )


@pytest.mark.parametrize(("command", "theirs", "ours"), OTHERS)
def test_a_familiar_flag_of_the_other_commands_means_what_it_means_at_home(
    command: str, theirs: str, ours: str
) -> None:
    parse = command_module(command).parse
    assert (
        parse(shlex.split(theirs)) == parse(shlex.split(ours)) == parse(shlex.split(theirs.replace("-path", "_path")))
    )


def test_every_familiar_name_is_tried_above_and_shown_by_help() -> None:
    shown = run("train", "--help").out
    for names in [*(one.declaration.aliases for one in all_settings().values()), *TO_TRAIN.values()]:
        for name in names:
            assert any(flag(name) in theirs.split() for theirs, _ in TRAIN), name
            assert flag(name) in shown
    shown = "".join(run(command, "--help").out for command in ("generate", "merge", "evaluate"))
    for names in OTHER_COMMANDS.values():
        for name in names:
            assert any(flag(name) in theirs.split() for _, theirs, _ in OTHERS), name
            assert flag(name) in shown


def test_what_train_does_anyway_is_taken_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NEEDLESS:
        assert meaning(f"{flag(name)} true") == meaning("")
    told = capsys.readouterr().out
    assert all(flag(name) in told for name, why in NEEDLESS.items() if why)
    assert meaning("--train --max-steps 5") == meaning("--steps 5")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--steps 5 --iters 6", ["--steps", "--iters", "one setting"]),
        ("--warmup-ratio 5", ["--warmup-ratio 5.0", "--warmup"]),
        ("--optim adam", ["--optim adam", "--optimizer adamw --weight-decay 0"]),
        ("--optim lion_8bit", ["--optim", "'lion_8bit'", "adamw, adamw_8bit, adafactor, lion, sgd"]),
        ("--lr-scheduler-type cosine_with_restarts", ["cosine_with_restarts", "cosine, linear, constant"]),
        ("--resume-adapter-file adapters/0000100_adapters.safetensors", ["--resume-adapter-file", "folder"]),
        ("--train false", ["--train false"]),
        ("--use-peft false", ["--use-peft false", "--method full"]),
        ("--packing maybe", ["--packing", "'maybe'"]),
        ("--lora-r many", ["--lora-r", "'many'"]),
        ("--resume old --lora-r 4", ["--resume", "no other flag"]),
        ("--report-to wandb", ["--report-to 'wandb'", "tensorboard"]),
    ],
)
def test_what_has_no_equal_here_is_refused_with_what_to_give_instead(line: str, named: list[str]) -> None:
    refused(line, *named)


@given(st.integers(1, 64), st.floats(0.1, 100))
def test_the_scale_of_mlx_is_alpha_over_rank(rank: int, scale: float) -> None:
    settings, _, _ = meaning(f"--scale {scale!r} --rank {rank}")
    assert settings.values()["alpha"] / settings.values()["rank"] == pytest.approx(scale)


# --- Config files ---


def test_the_example_of_mlx_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert meaning(f"-c {written('run.yaml', MLX_CONFIG)}") == meaning(SAME_IN_FLAGS)
    told = capsys.readouterr().out
    assert "run.yaml: val_batches changes nothing" in told and "scale" not in told


def test_the_schedule_of_mlx_is_ours() -> None:
    ours = SAME_IN_FLAGS.replace("0.00001", "2e-4").replace("\n", " ") + "--schedule cosine --warmup 100"
    assert meaning(f"-c {written('run.yaml', MLX_CONFIG + MLX_SCHEDULE)}") == meaning(ours)
    linear = "{name: linear_schedule, arguments: [1e-3, 0.0, 1000]}"
    ours = SAME_IN_FLAGS.replace("0.00001", "1e-3").replace("\n", " ") + "--schedule linear --warmup 0"
    assert meaning(f"-c {written('run.yaml', MLX_CONFIG + 'lr_schedule: ' + linear)}") == meaning(ours)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "lora-r: 2\nlearning_rate: 1e-3\ntarget_modules: [v_proj]\npacking: true\nout: here\n"),
        ("run.yml", "rank: 2\nlearning-rate: 0.001\ntarget_modules: v_proj\npacking: yes\noutput_dir: here\n"),
        ("run.toml", 'lora_r = 2\nlearning_rate = 1e-3\ntarget-modules = ["v_proj"]\npacking = true\nout = "here"\n'),
        (
            "run.json",
            '{"lora_r": 2, "learning_rate": 1e-3, "keys": ["v_proj"], "packing": true, "out": "here", "data": null}',
        ),
    ],
)
def test_a_file_of_settings_means_the_same_flags_and_the_command_line_wins(name: str, text: str) -> None:
    ours = "--rank 2 --learning-rate 0.001 --target-modules v_proj --packing --out here"
    assert meaning(f"-c {written(name, text)}") == meaning(ours)
    for more in ("--rank 3", "--lora_r 3", "--packing false", "--adapter-path there", "--data other.jsonl"):
        last = {"--lora_r 3": "--rank 3", "--adapter-path there": "--out there"}.get(more, more)
        assert meaning(f"--config {name} {more}") == meaning(f"{ours} {last}") != meaning(ours)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ranks: 4", ["run.yaml", "'ranks'"]),
        ("resume: old", ["run.yaml", "'resume'"]),
        ("lora_parameters: {rank: 4, shape: 5}", ["run.yaml", "'shape'"]),
        ("lora_parameters: [4]", ["run.yaml: lora_parameters"]),
        ("lora_parameters: {rank: 4}\nrank: 5", ["run.yaml: rank", "twice"]),
        ("lora_parameters: {scale: 4, alpha: 5}", ["run.yaml: scale", "run.yaml: alpha"]),
        ("iters: 4\nsteps: 4", ["run.yaml: iters", "run.yaml: steps"]),
        ("iters: many", ["run.yaml: iters", '"many"']),
        ("scale: 2\nrank: four", ["run.yaml: rank", '"four"']),
        ("lora_r: 2.5", ["run.yaml: lora_r must be int, not 2.5"]),
        ("packing: 1", ["run.yaml: packing must be bool"]),
        ("optimizer: adamw\noptimizer_config: {adamw: {betas: [0.9, 0.98]}}", ["run.yaml", "'betas'"]),
        ("lr_schedule: {name: step_decay, arguments: [1, 0.9, 10]}", ["run.yaml: lr_schedule", "cosine_decay"]),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-3, 100, 1e-4]}", ["lr_schedule ends at 0.0001"]),
        ("iters: 200\nlr_schedule: {name: cosine_decay, arguments: [1e-3, 100]}", ["lr_schedule decays over 100"]),
        ("lr_schedule: {name: cosine_decay, arguments: [high, 100]}", ["lr_schedule: 'high' should be a number"]),
        ("- rank\n- 4", ["run.yaml must hold names and values"]),
        ("rank: [4", ["run.yaml: not valid YAML"]),
        ("rank: !!python/object/apply:os.getcwd []", ["run.yaml: not valid YAML"]),
    ],
)
def test_a_mistake_in_a_file_is_told_with_file_and_key(text: str, named: list[str]) -> None:
    refused(f"-c {written('run.yaml', text)}", *named)


def test_a_file_that_is_no_file_of_settings_is_refused() -> None:
    refused("-c nowhere.yaml", "nowhere.yaml: no such file")
    refused(f"-c {written('run.toml', 'rank = ')}", "run.toml: not valid TOML")
    refused(f"-c {written('run.ini', '')}", "run.ini", ".yaml, .toml or .json")


def test_numbers_that_yaml_takes_for_texts_are_numbers() -> None:
    for text in ("1e-5", "1E-5", "1e-05", "10e-6", "0.00001", "1.0e-5"):
        settings, _, _ = meaning(f"-c {written('run.yaml', f'learning_rate: {text}')}")
        assert settings.learning_rate == pytest.approx(1e-5)
    settings, _, _ = meaning(f"-c {written('run.yaml', 'prompt_feature: q1e5')}")
    assert settings.prompt_feature == "q1e5"


def test_flags_and_files_say_the_same_of_every_setting() -> None:
    """Every setting can be given in a file, under its own name."""
    settings, _, _ = meaning("--data rows.jsonl --lora_r 3 --scale 3 --packing --keys q_proj")
    values = {name: value for name, value in settings.values().items() if name != "revision"}
    written("run.json", json.dumps(values))
    assert meaning("-c run.json")[0] == settings


def test_a_file_may_say_no_to_one_half_and_a_flag_to_the_file(tmp_path: Path) -> None:
    written("both.yaml", "bf16: true\nfp16: false\n")
    assert meaning("-c both.yaml") == meaning("--mixed-precision bf16")
    assert meaning("-c both.yaml --bf16 false") == meaning("")
    written("no.yaml", "mixed_precision: no\n")
    assert meaning("-c no.yaml") == meaning("")
    refused("--bf16 --fp16", "--fp16 and --bf16 are two names for one setting")
