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

from minilora.cli.flags import OTHER_COMMANDS, TO_TRAIN, by_setting, ours
from minilora.cli.foreign import IGNORED, ONLY
from minilora.cli.train_flags import choose_settings, parse
from minilora.methods.method import known_methods
from minilora.methods.setting import flag, settings_of
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
    ("--base-model-name-or-path some/model", "--model some/model"),
    ("--lora-r 4", "--rank 4"),
    ("--r 4", "--rank 4"),
    ("--target-modules q_proj,v_proj", "--target-modules q_proj v_proj"),
    ("--lora-modules-to-save norm,lm_head", "--modules-to-save norm lm_head"),
    ("--rank-pattern q_proj=4,v_proj=2", "--rank-pattern q_proj=4 v_proj=2"),
    ("--warmup-steps 0 --warmup-ratio 0.1", "--warmup 0.1"),
    ("--max-steps -1 --num-train-epochs 2", "--epochs 2"),
    ("--model some/model --model-revision main", "--model some/model"),
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
    ("--max-steps -1 --epochs 2", "--epochs 2"),
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
    for name, why in IGNORED.items():
        assert meaning(f"{flag(name)} true") == meaning("")
        told = capsys.readouterr().err
        assert told == (f"ignored: {flag(name)} ({why})\n" if why else "")
        assert meaning(f"{flag(name)} 0") == meaning("") and not capsys.readouterr().err
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


# --- Contradictions ---


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--method full --rank 4", ["--rank is for --method", "lora", "full has no use for it"]),
        ("--method full --lora-r 4", ["--lora-r is for --method"]),
        ("--method full --rank 8", ["--rank is for --method"]),
        ("--method bitfit --dropout 0.1", ["--dropout is for --method", "bitfit has no use"]),
        ("--init-text hello", ["--init-text is for --method prefix, prompt; lora has no use for it"]),
        ("--method full --loraplus-lr-ratio 16", ["--loraplus-lr-ratio is for --method"]),
        ("--iters 5 --epochs 2", ["--iters and --epochs contradict"]),
        ("--steps 5 --num-train-epochs 2", ["--steps and --num-train-epochs contradict"]),
        ("--max-steps 5 --epochs 2 --method full", ["--max-steps and --epochs contradict"]),
        ("-c both.yaml", ["both.yaml: max_steps and --config both.yaml: num_train_epochs contradict"]),
        ("--resume old --steps 9", ["no run to resume"]),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(line: str, named: list[str]) -> None:
    written("both.yaml", "max_steps: 5\nnum_train_epochs: 2\n")
    refused(line, *named)


@given(st.data())
def test_a_setting_of_another_method_is_refused_and_one_of_its_own_taken(data: st.DataObject) -> None:
    """Whatever its value, since also the default would be expected to act."""
    method = data.draw(st.sampled_from(sorted(known_methods())))
    own = settings_of(known_methods()[method])
    names = sorted(all_settings().keys() - settings_of(Settings).keys() - {"method"})
    name = data.draw(st.sampled_from([n for n in names if all_settings()[n].default not in ((), {}, "", False)]))
    default = all_settings()[name].default
    value = " ".join(default) if isinstance(default, tuple) else str(default)
    line = f"--method {method} {flag(name)} {value}"
    if name in own:
        if name not in known_methods()[method].names[method]:
            assert meaning(line)[0] == meaning(f"--method {method}")[0]
    else:
        with pytest.raises(ValueError, match=f"{flag(name)} is for --method .*; .* has no use for it"):
            meaning(line)


def test_in_a_file_settings_of_another_method_are_told_and_the_command_line_chooses_the_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of mlx-lm always has lora_parameters, with `fine_tune_type: full` too."""
    written("run.yaml", "lora_parameters: {rank: 4, dropout: 0.1}\n")
    assert meaning("-c run.yaml --method full") == meaning("--method full")
    assert capsys.readouterr().err == ("--config run.yaml, ignored: rank, dropout (--method full has no use for it)\n")


def test_the_length_of_a_run_on_the_command_line_wins_over_that_in_the_file() -> None:
    written("steps.yaml", "iters: 1000\n")
    written("epochs.yaml", "epochs: 2\n")
    assert meaning("-c steps.yaml --epochs 2") == meaning("--epochs 2")
    assert meaning("-c epochs.yaml --steps 7") == meaning("--steps 7")
    assert meaning("--epochs 2")[0].steps == 0  # instead of the steps that the built-in task has of its own


@pytest.mark.parametrize(
    ("method", "told"), [("lora", "--adapter old --steps N"), ("full", "--model old --steps N"), ("dora", "begin anew")]
)
def test_resuming_with_more_steps_is_told_how_to_train_longer(method: str, told: str) -> None:
    settings, _, _ = meaning(f"--method {method}")
    settings.save(Path("old"))
    for more in ("--steps 900", "--iters 900", "--epochs 9"):
        refused(f"--resume old {more}", "no other flag", "To train longer", told)
    with pytest.raises(ValueError, match=r"no other flag$"):
        meaning("--resume old --seed 3")


# --- Config files ---


def test_the_example_of_mlx_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert meaning(f"-c {written('run.yaml', MLX_CONFIG)}") == meaning(SAME_IN_FLAGS)
    told = capsys.readouterr().err
    assert told == "--config run.yaml, ignored: val_batches, test_batches (every held-out row is used); " + (
        "steps_per_report (every step is reported)\n"
    )


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
        ("ranks: 4", ["did you mean rank"]),
        ("learning_rat: 4", ["'learning_rat' is not a setting: did you mean learning_rate?"]),
        ("lora_alpa: 4", ["did you mean lora_alpha?"]),
        ("- rank\n- 4", ["run.yaml must hold names and values"]),
        ("rank: [4", ["run.yaml: not valid YAML"]),
        ("rank: !!python/object/apply:os.getcwd []", ["run.yaml: not valid YAML"]),
    ],
)
def test_a_mistake_in_a_file_is_told_with_file_and_key(text: str, named: list[str]) -> None:
    refused(f"-c {written('run.yaml', text)}", *named)


# Their published examples, key for key: mlx_lm/examples/lora_config.yaml; TRL's examples/cli_configs, and a recipe of
# the alignment handbook, but for its template and its data; an adapter_config.json of PEFT's method_comparison.
PUBLISHED = {
    "mlx.yaml": (
        MLX_CONFIG + "training_mode: normal\nnum_layers: 4\n",
        SAME_IN_FLAGS.replace("\n", " ") + "--num-layers 4",
        "every step is reported",
    ),
    "trl.yaml": (
        "model_name_or_path:\n  some/model\ndataset_name:\n  stanfordnlp/imdb\nreport_to:\n  none\n"
        "learning_rate:\n  0.0001\nlr_scheduler_type:\n  cosine\n",
        "--model some/model --data stanfordnlp/imdb --learning-rate 0.0001",
        "",
    ),
    "recipe.yaml": (
        """
        model_name_or_path: some/model
        model_revision: main
        torch_dtype: bfloat16
        attn_implementation: flash_attention_2
        load_in_4bit: true
        use_peft: true
        lora_r: 16
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_modules: [q_proj, k_proj]
        dataset_name: rows.jsonl
        dataset_num_proc: 12
        bf16: true
        do_eval: true
        eval_strategy: epoch
        gradient_accumulation_steps: 2
        gradient_checkpointing: true
        gradient_checkpointing_kwargs:
          use_reentrant: false
        hub_model_id: zephyr-7b-sft-qlora
        hub_strategy: every_save
        learning_rate: 2.0e-04
        log_level: info
        logging_steps: 5
        logging_strategy: steps
        lr_scheduler_type: cosine
        max_length: 2048
        max_steps: -1
        num_train_epochs: 1
        output_dir: here
        overwrite_output_dir: true
        per_device_eval_batch_size: 8
        per_device_train_batch_size: 4
        push_to_hub: true
        report_to:
        - tensorboard
        save_strategy: "steps"
        save_steps: 100
        save_total_limit: 1
        seed: 42
        warmup_ratio: 0.1
        """,
        "--model some/model --frozen nf4 --rank 16 --alpha 16 --dropout 0.05 --target-modules q_proj k_proj --data "
        "rows.jsonl --bf16 --grad-accumulation 2 --activation-checkpointing --learning-rate 2e-4 --max-length 2048 "
        "--epochs 1 --out here --batch-size 4 --report-to tensorboard --save-every 100 --seed 42 --warmup 0.1",
        "nothing is sent anywhere",
    ),
    "adapter_config.json": (
        json.dumps(
            {
                **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "revision")),
                **dict.fromkeys(("exclude_modules", "layer_replication", "layers_pattern", "layers_to_transform")),
                **dict.fromkeys(("megatron_config", "modules_to_save", "target_modules")),
                **dict.fromkeys(("fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_rslora"), False),
                **{"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "bias": "none", "peft_type": "LORA"},
                **{"init_lora_weights": True, "lora_alpha": 64, "lora_dropout": 0.0, "r": 32},
                **{"megatron_core": "megatron.core", "task_type": "CAUSAL_LM"},
            }
        ),
        "--rank 32 --alpha 64 --target-modules q_proj v_proj",
        "it acts only beside another key",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_example_loads_and_what_of_it_changes_nothing_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilora.runs.settings.check_report_to", lambda report_to: None)  # the package may be missing
    text, ours, told = PUBLISHED[name]
    assert meaning(f"-c {written(name, text)}") == meaning(ours)
    shown = capsys.readouterr().err
    assert (
        shown.count("\n") == bool(told)
        and told in shown
        and (not told or shown.startswith(f"--config {name}, ignored:"))
    )


def test_an_adapters_configuration_that_leaves_fields_open_means_what_peft_means_by_that() -> None:
    written("adapter_config.json", '{"peft_type": "LORA"}')
    assert meaning("-c adapter_config.json") == meaning("--rank 8 --alpha 8 --target-modules q_proj v_proj")


@pytest.mark.parametrize("name", ONLY)
def test_what_cannot_be_honoured_is_refused_by_name_and_what_happens_anyway_is_not(name: str) -> None:
    values, instead = ONLY[name]
    file = written("run.json", json.dumps({name: "something else"}))
    refused(f"-c {file}", f"run.json: {name} 'something else' cannot be honoured: {instead}")
    refused(f"{flag(name)} something", f"{flag(name)} 'something' cannot be honoured", instead)
    for value in (*values, None, False, 0, [], {}):
        assert by_setting({name: value}, Path("run.json")) == {}
    for value in (*values, None, False, 0):
        assert by_setting({name: str(value)}) == {}


def test_no_key_is_both_a_setting_and_none() -> None:
    assert not (IGNORED.keys() | ONLY.keys()) & (all_settings().keys() | ours().keys())
    assert not IGNORED.keys() & ONLY.keys()


def test_a_list_of_reports_is_refused_by_the_name_that_is_not_known() -> None:
    refused(f"-c {written('run.yaml', 'report_to: [tensorboard, wandb]')}", "--report-to 'wandb'")
    assert meaning(f"-c {written('run.yaml', 'report_to: []')}") == meaning("")


def test_an_expression_with_commas_stays_whole() -> None:
    (target,) = meaning("--target-modules '.*(q|v)_proj{1,2}'")[0].values()["target_modules"]
    assert target == ".*(q|v)_proj{1,2}"


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
