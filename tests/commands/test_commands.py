"""The commands, used as a user does: what they promise to write and print, and how they meet a mistake."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import (
    ADAPTER,
    CONFIG,
    PAIRS,
    ROWS,
    RUN_FILES,
    SUMMARY_KEYS,
    assert_refused,
    contents,
    good,
    process,
    read,
    run,
    write_rows,
)

from minilora import generate
from minilora.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def adapter_of_chats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an adapter that has learnt the chats, and what the command printed."""
    folder = tmp_path_factory.mktemp("chats")
    for part in ("train", "valid", "test"):
        write_rows(folder / "data" / f"{part}.jsonl", ROWS["messages"])
    flags = "--steps 120 --learning-rate 0.01 --rank 4".split()
    out = good("train", "--model", model, "--data", folder / "data", "--out", folder / "run", *flags)
    (folder / "run" / "log.txt").write_text(out)
    return folder / "run"


# --- train: what it takes, and what it leaves ---


@pytest.mark.parametrize("name", [*(f"{shape}.jsonl" for shape in ROWS), "book.txt", "parts", "train-only"])
def test_a_run_on_each_shape_of_data_leaves_all_that_is_promised(train: Any, name: str) -> None:
    run_folder = train(name)
    assert {path.name for path in run_folder.iterdir()} == RUN_FILES
    summary = read(run_folder / "summary.json")
    assert summary.keys() >= SUMMARY_KEYS
    held_out, matched = name != "train-only", name in ("pairs.jsonl", "messages.jsonl", "chat-pairs.jsonl")
    assert (summary["base_loss"] is not None) == (summary["adapted_loss"] is not None) == held_out
    assert (summary["base_exact_match"] is not None) == (summary["adapted_exact_match"] is not None) == matched
    assert summary["drift_kl"] >= 0 and summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 1e6
    adapter = load_file(run_folder / ADAPTER)
    assert summary["trainable_parameters"] == sum(tensor.size for tensor in adapter.values())
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_economies_change_the_adapter_by_nothing_or_by_rounding(train: Any) -> None:
    plain = load_file(train("parts", "--batch-size", 4, "--dropout", 0.1, out="plain") / ADAPTER)
    for flag in (("--activation-checkpointing",), ("--frozen", "stored")):
        same = load_file(train("parts", "--batch-size", 4, "--dropout", 0.1, *flag, out=flag[0]) / ADAPTER)
        assert all(same[name].tobytes() == plain[name].tobytes() for name in plain)
    exact = ("--dtype", "float64", "--optimizer", "sgd", "--learning-rate", 0.1)
    whole = load_file(train("parts", "--batch-size", 8, *exact, out="whole") / ADAPTER)
    for flags in (("--batch-size", 2, "--grad-accumulation", 4), ("--batch-size", 8, "--packing")):
        close = load_file(train("parts", *flags, *exact, out="-".join(map(str, flags))) / ADAPTER)
        assert all(np.allclose(close[name], whole[name], rtol=1e-6, atol=1e-9) for name in whole)


def test_the_flags_of_the_adapter_decide_its_shape_and_start(train: Any) -> None:
    flags = "--rank 3 --alpha 5 --target-modules q_proj up_proj --init gaussian --learning-rate 0".split()
    run_folder = train("pairs.jsonl", *flags, "--optimizer", "sgd", "--schedule", "linear")
    adapter, config = load_file(run_folder / ADAPTER), read(run_folder / "adapter_config.json")
    names = [f"base_model.model.model.layers.{i}.{module}" for i in (0, 1) for module in
             ("self_attn.q_proj", "mlp.up_proj")]  # fmt: skip
    assert sorted(adapter) == sorted(f"{name}.lora_{side}.weight" for name in names for side in "AB")
    assert all(adapter[f"{name}.lora_A.weight"].shape == (3, 32) for name in names)
    assert 0.2 < np.std([adapter[f"{name}.lora_A.weight"] for name in names]) < 0.5  # 1/r
    assert not any(adapter[f"{name}.lora_B.weight"].any() for name in names)  # at rate 0 nothing has moved
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["q_proj", "up_proj"])
    summary = read(run_folder / "summary.json")
    assert summary["base_loss"] == summary["adapted_loss"] and summary["drift_kl"] == 0


def test_full_fine_tuning_leaves_a_whole_model_that_every_command_takes(train: Any, data: Path) -> None:
    run_folder = train("parts", "--method", "full", "--learning-rate", 0.01)
    summary = read(run_folder / "summary.json")
    assert summary["trainable_parameters"] == summary["total_parameters"]
    figures = json.loads(good("evaluate", "--model", run_folder, "--data", data / "parts", "--json"))
    assert math.isclose(figures["loss"], summary["adapted_loss"], rel_tol=1e-5)
    assert figures["loss"] < summary["base_loss"]


def test_training_goes_on_from_an_adapter(train: Any, adapter: Path) -> None:
    run_folder = train("train-only", "--adapter", adapter, "--learning-rate", 0)
    before, after = load_file(adapter / ADAPTER), load_file(run_folder / ADAPTER)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert read(run_folder / "adapter_config.json")["r"] == 4


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_config_file_gives_flags_and_those_on_the_command_line_win(train: Any, tmp_path: Path, suffix: str) -> None:
    config = tmp_path / f"config{suffix}"
    config.write_text(
        '{"rank": 2, "grad-accumulation": 2, "steps": 2, "target_modules": ["v_proj"]}'
        if suffix == ".json"
        else 'rank = 2\ngrad-accumulation = 2\nsteps = 2\ntarget_modules = ["v_proj"]'
    )
    settings = read(train("pairs.jsonl", "--config", config, "--steps", 1) / "settings.json")
    found = [settings[name] for name in ("rank", "grad_accumulation", "steps", "target_modules")]
    assert found == [2, 2, 1, ["v_proj"]]


def test_out_may_stand_in_the_config_file_and_the_command_line_still_wins(
    model: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"out": str(tmp_path / "first"), "steps": 1}))
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--config", config)
    good("train", *flags)
    good("train", *flags, "--out", tmp_path / "second")
    assert (tmp_path / "first" / ADAPTER).read_bytes() == (tmp_path / "second" / ADAPTER).read_bytes()


def test_without_out_each_run_gets_a_new_folder_named_after_its_data(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        good("train", "--model", model, "--data", data / "pairs.jsonl", "--steps", 1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["pairs-1", "pairs-2"]


def test_training_reports_the_exact_match_that_evaluate_finds(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", PAIRS)
    write_rows(tmp_path / "data" / "test.jsonl", [*PAIRS, {"prompt": "up ->", "completion": " DOWN"}])
    flags = "--steps 80 --learning-rate 0.01".split()
    out = good("train", "--model", model, "--data", tmp_path / "data", "--out", tmp_path / "run", *flags)
    summary = read(tmp_path / "run" / "summary.json")
    assert (summary["base_exact_match"], summary["adapted_exact_match"]) == (0, pytest.approx(5 / 6))
    assert "right: UP" in out and "after: UP" in out and "exact match" in out
    found = good("evaluate", "--model", model, "--adapter", tmp_path / "run", "--data", tmp_path / "data", "--json")
    figures = json.loads(found)
    assert figures["exact_match"] == summary["adapted_exact_match"]
    assert math.isclose(figures["loss"], summary["adapted_loss"], rel_tol=1e-5)
    assert math.isclose(figures["drift_kl"], summary["drift_kl"], rel_tol=1e-4)


# --- resuming ---


def test_a_process_killed_at_a_random_moment_and_resumed_ends_with_the_bytes_of_the_uninterrupted_run(
    model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--steps", 150, "--dropout", 0.1, "--save-every", 7]
    flags += ["--eval-every", 10, "--batch-size", 2, "--grad-accumulation", 2]
    good("train", *flags, "--out", tmp_path / "whole")
    cut, line = tmp_path / "cut", random.randint(1, 130)
    child = process("train", *flags, "--out", cut)
    while child.poll() is None and _line_count(cut / "metrics.jsonl") < line:
        time.sleep(0.001)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, f"it ended before its metrics had {line} lines"
    assert not (cut / "summary.json").exists()
    good("train", "--resume", cut)
    assert (cut / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes(), f"killed at line {line}"
    assert {path.name for path in cut.iterdir()} == RUN_FILES
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 151))


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_before_its_first_step_is_resumed_too(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("pairs.jsonl", out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyError):  # a stand-in for SIGKILL: no command catches it
        patch.setattr("minilora.train.judge", lambda *_: {}["killed"])
        train("pairs.jsonl", out="cut")
    cut = whole.parent / "cut"
    good("train", "--resume", cut)
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_resuming_a_finished_run_changes_nothing(train: Any) -> None:
    run_folder = train("pairs.jsonl")
    before = contents(run_folder)
    good("train", "--resume", run_folder)
    for name in (ADAPTER, "adapter_config.json", "settings.json", "metrics.jsonl"):
        assert contents(run_folder)[name] == before[name]


def test_a_run_is_not_resumed_on_other_data(train: Any, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "own.jsonl", PAIRS)
    good("train", "--model", model, "--data", rows, "--out", tmp_path / "run", "--steps", 2)
    write_rows(rows, [{**row, "completion": " other"} for row in PAIRS])
    assert_refused(run("train", "--resume", tmp_path / "run"), "data has changed")


# --- merge ---


def test_the_merged_model_measures_like_base_and_adapter(model: Path, adapter: Path, merged: Path, data: Path) -> None:
    rows = ("--data", data / "pairs.jsonl", "--json")
    together = json.loads(good("evaluate", "--model", model, "--adapter", adapter, *rows))
    alone = json.loads(good("evaluate", "--model", merged, *rows))
    base = json.loads(good("evaluate", "--model", model, *rows))
    assert math.isclose(alone["loss"], together["loss"], rel_tol=1e-5)
    assert alone["exact_match"] == together["exact_match"] == 1 and together["loss"] < base["loss"] / 2


def test_merging_rounds_only_where_asked_and_tells_what_is_lost(
    model: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    base, exact = load_file(model / "model.safetensors"), load_file(merged / "model.safetensors")
    adapted = [name for name in base if "_proj" in name]
    assert all(exact[name].dtype == np.float32 for name in exact)
    untouched = base.keys() - set(adapted)
    assert all(np.array_equal(base[name].astype(np.float32), exact[name]) for name in untouched)
    lost = {}
    for dtype in ("float32", "float16", "bfloat16"):
        out = good("merge", "--model", model, "--adapter", adapter, "--out", tmp_path / dtype, "--dtype", dtype)
        report, weights = read(tmp_path / dtype / "merge.json"), load_file(tmp_path / dtype / "model.safetensors")
        assert {tensor.dtype.name for tensor in weights.values()} == {dtype}
        error = sum(((weights[name].astype(np.float64) - exact[name]) ** 2).sum() for name in adapted)
        update = sum(((exact[name] - base[name].astype(np.float64)) ** 2).sum() for name in adapted)
        lost[dtype] = report["lost_share_of_update"]
        assert math.isclose(lost[dtype], math.sqrt(error / update), rel_tol=1e-4)
        same = sum(int((weights[name].astype(np.float32) == base[name].astype(np.float32)).sum()) for name in adapted)
        assert report["unchanged_share"] == same / sum(base[name].size for name in adapted)
        assert f"lost {lost[dtype]:.2%} of the update" in out
    assert 0 == lost["float32"] < lost["float16"] < lost["bfloat16"] < 1


def test_a_conversation_is_answered_shown_and_matched_as_other_rows_are(
    model: Path, tmp_path: Path, adapter_of_chats: Path
) -> None:
    """The assistant's last turn is the right answer, and the token that closes a turn ends it."""
    out = (adapter_of_chats / "log.txt").read_text()
    summary = read(adapter_of_chats / "summary.json")
    assert summary["adapted_exact_match"] > summary["base_exact_match"] == 0
    for told in ("up ->", "right: UP", "after: UP"):
        assert told in out
    flags = ("--model", model, "--adapter", adapter_of_chats, "--data", tmp_path / "chats.jsonl", "--json")
    write_rows(tmp_path / "chats.jsonl", ROWS["messages"])
    assert json.loads(good("evaluate", *flags))["exact_match"] == summary["adapted_exact_match"]


# --- generate ---


def test_an_adapter_that_learnt_from_messages_is_asked_in_the_chat_template(
    model: Path, adapter: Path, adapter_of_chats: Path
) -> None:
    """Unless --no-chat says otherwise. One that learnt from prompts is not."""
    flags = ("generate", "--adapter", adapter_of_chats, "--prompt", "up ->", "--max-tokens", 4)
    asked, plain = run(*flags), run(*flags, "--no-chat")
    assert asked.out == good(*flags, "--chat") != plain.out
    assert "--no-chat" in asked.err and "--no-chat" not in plain.err
    assert "--no-chat" not in run("generate", "--adapter", adapter, "--prompt", "up ->", "--max-tokens", 4).err


def test_greedy_generation_is_the_same_each_time_and_answers_what_was_learnt(model: Path, adapter: Path) -> None:
    flags = ("--model", model, "--adapter", adapter, "--prompt", "left ->")
    assert good("generate", *flags) == good("generate", *flags, "--seed", 7) == " LEFT\n"


def test_drawing_is_decided_by_the_seed_and_cut_by_the_flags(model: Path) -> None:
    def drawn(*flags: object) -> str:
        return good("generate", "--model", model, "--prompt", "one", "--max-tokens", 12, "--temp", 1, *flags)

    assert drawn("--seed", 1) == drawn("--seed", 1) != drawn("--seed", 2)
    greedy = good("generate", "--model", model, "--prompt", "one", "--max-tokens", 12)
    assert drawn("--top-k", 1) == drawn("--top-p", 1e-9) == greedy


def test_the_prompt_may_come_from_standard_input_and_be_a_chat(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("down ->"))
    assert good("generate", "--model", model, "--adapter", adapter) == " DOWN\n"
    flags = ("--model", model, "--max-tokens", 5, "--prompt")
    written_out = good("generate", *flags, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert good("generate", *flags, "hello", "--chat") == written_out != good("generate", *flags, "hello")


def test_words_appear_while_later_ones_are_still_to_come(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Screen(io.StringIO):
        def flush(self) -> None:
            events.append("shown")

    def noted(*arguments: Any) -> Any:
        for tokens in stream(*arguments):
            events.append("computed")
            yield tokens

    stream = generate.stream
    monkeypatch.setattr(generate, "stream", noted)
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(model), "--prompt", "one", "--max-tokens", "5"])
    with redirect_stdout(Screen()) as screen:
        assert generate.main() == 0
    assert events.index("shown") < len(events) - 1 - events[::-1].index("computed")
    assert screen.getvalue().endswith("\n") and events.count("computed") == 5


def test_characters_of_several_tokens_are_shown_whole(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = "naïve: “日本” 🙂."
    shown = list(generate.pieces(iter(tokenizer.encode(text)), tokenizer))
    assert "".join(shown) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(shown) and len(shown) > 5
    cut_short = tokenizer.encode("a🙂")[:-1]
    assert "".join(generate.pieces(iter(cut_short), tokenizer)) == tokenizer.decode(cut_short)


# --- evaluate ---


def test_evaluate_prints_one_line_of_json_or_a_table(model: Path, data: Path) -> None:
    rows = ("--model", model, "--data", data / "pairs.jsonl")
    line = good("evaluate", *rows, "--json")
    assert line.count("\n") == 1 and line.endswith("\n")
    figures = json.loads(line)
    assert figures.keys() == {"loss", "perplexity", "exact_match", "examples", "left_out"}
    assert math.isclose(figures["perplexity"], math.exp(figures["loss"])) and figures["examples"] == len(PAIRS)
    table = good("evaluate", *rows)
    assert all(name in table for name in figures) and f"{figures['loss']:.4f}" in table


def test_the_batch_size_of_an_evaluation_does_not_matter(model: Path, data: Path) -> None:
    flags = ("--model", model, "--data", data / "text.jsonl", "--json", "--batch-size")
    losses = [json.loads(good("evaluate", *flags, size))["loss"] for size in (1, 2, 8)]
    assert max(losses) - min(losses) < 1e-5


def test_a_random_checkpoint_of_a_configuration_is_as_perplexed_as_chance(
    model: Path, data: Path, tmp_path: Path
) -> None:
    good("random_checkpoint", model / "config.json", "--out", tmp_path / "new", "--tokenizer", model)
    loss = json.loads(good("evaluate", "--model", tmp_path / "new", "--data", data / "parts", "--json"))["loss"]
    assert abs(loss - math.log(CONFIG["vocab_size"])) < 0.1


def test_the_exact_match_is_asked_of_the_rows_that_the_loss_is_measured_on(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    too_long = {"prompt": "one and two " * 100, "completion": " ONE"}
    rows = write_rows(tmp_path / "rows.jsonl", [*PAIRS, too_long])
    figures = json.loads(good("evaluate", "--model", model, "--adapter", adapter, "--data", rows, "--json"))
    assert (figures["examples"], figures["left_out"], figures["exact_match"]) == (len(PAIRS), 1, 1.0)


def test_a_held_out_row_with_an_empty_prompt_is_no_obstacle(model: Path, data: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "", "completion": "one and two"}])
    assert json.loads(good("evaluate", "--model", model, "--data", rows, "--json"))["examples"] == len(PAIRS) + 1


# --- as processes ---


def test_the_commands_work_as_processes_with_pipes(model: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--adapter", adapter)
    out, err = (child := process("generate", *flags)).communicate("up ->")
    assert (child.returncode, out) == (0, " UP\n"), err
    out, err = (child := process("evaluate", *flags, "--data", data / "pairs.jsonl", "--json")).communicate()
    assert child.returncode == 0 and json.loads(out)["exact_match"] == 1 and out.count("\n") == 1, err
    out, err = (child := process("merge", *flags, "--out", adapter)).communicate()
    assert child.returncode == 2 and err.startswith("error: --out ") and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_from_the_keyboard_says_how_to_go_on(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--out", tmp_path / "run", "--steps", 100_000)
    child = process("train", *flags)
    try:
        while child.poll() is None and _line_count(tmp_path / "run" / "metrics.jsonl") < 5:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()  # one that does not hear would train on and on
    assert child.returncode == 130 and f"--resume {tmp_path / 'run'}" in out and "Traceback" not in err


@pytest.mark.parametrize("command", ["train", "generate", "merge", "evaluate", "random_checkpoint"])
def test_help_says_how_the_command_is_called(command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0 and result.out.startswith(f"usage: python -m minilora.{command} ")


# --- mistakes ---


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "a missing model": (["--model", "nowhere"], ["nowhere: no such folder"]),
    "missing data": (["--data", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    "data of an unknown kind": (["--data", "nowhere"], ["nowhere", ".jsonl"]),
    "a line that is not JSON": (["--data", "bad.jsonl"], ["bad.jsonl, line 2: not valid JSON"]),
    "a row of no known shape": (["--data", "shape.jsonl"], ["shape.jsonl, line 1", "'question'"]),
    "an unknown target": (["--target-modules", "query"], ["'query'", "q_proj"]),
    "rank 0": (["--rank", "0"], ["--rank 0"]),
    "a rank that is no number": (["--rank", "many"], ["--rank", "'many'"]),
    "dropout of everything": (["--dropout", "1"], ["--dropout 1.0"]),
    "a negative rate": (["--learning-rate", "-1"], ["--learning-rate -1.0"]),
    "an infinite rate": (["--learning-rate", "inf"], ["--learning-rate inf"]),
    "an alpha that is no number": (["--alpha", "nan"], ["--alpha nan"]),
    "epochs without end": (["--epochs", "inf", "--steps", "0"], ["--epochs inf"]),
    "no batch": (["--batch-size", "0"], ["--batch-size 0"]),
    "nothing to do": (["--steps", "0", "--epochs", "0"], ["--steps", "--epochs"]),
    "an unknown schedule": (["--schedule", "step"], ["--schedule", "'step'"]),
    "an unknown flag": (["--ranks", "4"], ["--ranks"]),
    "rows that are all too long": (["--max-length", "4"], ["--max-length 4"]),
    "a missing adapter": (["--adapter", "nowhere"], ["nowhere: no such folder"]),
    "an adapter for full fine-tuning": (["--adapter", "nowhere", "--method", "full"], ["--adapter", "full"]),
    "an adapter of another width": (["--adapter", "wide"], ["adapter_model.safetensors", "wrong shape"]),
    "an adapter of more layers": (["--adapter", "deep"], ["adapter_model.safetensors", "layers.7"]),
    "weights cut short": (["--model", "cut"], ["model.safetensors: not a whole safetensors file"]),
    "a model without tokenizer": (["--model", "mute"], ["tokenizer.json not found"]),
    "a missing config": (["--config", "nowhere.json"], ["nowhere.json"]),
    "an unknown setting": (["--config", "unknown.json"], ["unknown.json", "'ranks'"]),
    "a setting of another type": (["--config", "type.json"], ["type.json", "rank must be int"]),
    "targets of another type": (["--config", "targets.json"], ["targets.json", "target_modules"]),
    "resuming nothing": (["--resume", "nowhere"], ["nowhere holds no run to resume"]),
}


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory, model: Path, adapter: Path) -> Path:
    """A folder in which the mistakes have happened."""
    folder = tmp_path_factory.mktemp("broken")
    write_rows(folder / "good.jsonl", PAIRS)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_rows(folder / "shape.jsonl", [{"question": "a", "answer": "b"}])
    for name, values in {"unknown": {"ranks": 4}, "type": {"rank": "4"}, "targets": {"target_modules": 4}}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    tensors = load_file(adapter / ADAPTER)
    for name in ("wide", "deep"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file({name: np.zeros((9, 9), np.float32) for name in tensors}, folder / "wide" / ADAPTER)
    deeper = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(tensors | deeper, folder / "deep" / ADAPTER)
    for name in ("cut", "mute"):
        (folder / name).mkdir()
        for path in model.iterdir():
            if name == "cut" or "tokenizer" not in path.name:
                (folder / name / path.name).write_bytes(path.read_bytes())
    weights = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_training_is_told_in_one_line_and_nothing_is_written(
    broken: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    flags, named = MISTAKES[mistake]
    monkeypatch.chdir(broken)
    before = contents(broken)
    if "--resume" not in flags:
        flags = ["--model", str(model), "--data", "good.jsonl", "--out", str(tmp_path / "run"), "--steps", "1", *flags]
    assert_refused(run("train", *flags), *named)
    assert contents(broken) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_cuda_without_cupy_says_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.chdir(tmp_path)
    assert_refused(run(command, "--device", "cuda"), "minilora[cuda12]", "--device cpu")
    assert contents(tmp_path) == {}


def test_a_run_folder_is_not_overwritten_nor_resumed_with_other_flags(adapter: Path, model: Path, data: Path) -> None:
    before = contents(adapter)
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--out", adapter)
    assert_refused(run("train", *flags), str(adapter), "--out", f"--resume {adapter}")
    for flag in (("--rank", 4), ("--packing",), ("--steps", 60), ("--out", "elsewhere"), ("--config", "c.json")):
        assert_refused(run("train", "--resume", adapter, *flag), "--resume", "no other flag")
    assert contents(adapter) == before


def test_the_model_is_not_overwritten_by_its_own_fine_tuning(model: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = contents(copy)
    flags = ("--data", data / "pairs.jsonl", "--method", "full", "--steps", 1)
    assert_refused(run("train", "--model", copy, "--out", copy, *flags), "--out")
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["state.safetensors", "settings.json"])
def test_a_damaged_run_is_not_resumed(train: Any, name: str) -> None:
    run_folder = train("pairs.jsonl")
    whole = (run_folder / name).read_bytes()
    (run_folder / name).write_bytes(whole[: len(whole) // 2])
    assert_refused(run("train", "--resume", run_folder), name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_run_gives_advice_and_keeps_its_state(model: Path, data: Path, tmp_path: Path) -> None:
    flags = "--optimizer sgd --learning-rate 1e30 --max-grad-norm 0 --steps 5".split()
    result = run("train", "--model", model, "--data", data / "text.jsonl", "--out", tmp_path / "run", *flags)
    assert_refused(result, "--learning-rate")
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in state.values())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_merge_refuses_what_it_would_spoil_or_cannot_fit(
    broken: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("wide", "deep"):
        assert_refused(run("merge", "--model", model, "--adapter", broken / name, "--out", out), ADAPTER)
    assert_refused(run("merge", "--model", broken / "cut", "--adapter", adapter, "--out", out), "model.safetensors")
    assert not out.exists()
    before = contents(model)
    assert_refused(run("merge", "--model", model, "--adapter", adapter, "--out", model), "--out")
    assert contents(model) == before


def test_generate_and_evaluate_name_the_flag_at_fault(broken: Path, model: Path, adapter: Path, data: Path) -> None:
    for flags, named in (
        (["--prompt", "one " * 100], "the model sees 64"),
        (["--prompt", ""], "--prompt"),
        (["--prompt", "one", "--temp", "-1"], "--temp -1.0"),
        (["--prompt", "one", "--top-p", "0"], "--top-p 0.0"),
        (["--prompt", "one", "--max-tokens", "0"], "--max-tokens 0"),
        (["--prompt", "one", "--adapter", str(broken / "wide")], ADAPTER),
    ):
        assert_refused(run("generate", "--model", model, *flags), named)
    for flags, named in (
        (["--data", str(data / "nowhere.jsonl")], "nowhere.jsonl"),
        (["--data", str(data / "train-only")], "neither a test nor a valid file"),
        (["--data", str(data / "pairs.jsonl"), "--batch-size", "0"], "--batch-size"),
        (["--data", str(data / "pairs.jsonl"), "--max-length", "3"], "--max-length 3"),
    ):
        assert_refused(run("evaluate", "--model", model, "--json", *flags), named)
