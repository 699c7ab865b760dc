"""Files that ask for too much, or for what is not theirs: told in a line, soon, and before anything is built."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.commands import CHATS, PAIRS, REPOSITORY, assert_refused, good, process, run, write_rows
from support.gguf_models import write_model

from minilora.data import template_process
from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.methods import targets
from minilora.methods.targets import matches


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


# --- Types and numbers ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("vocab_size", 10**12), ("vocab_size", 1.0)),
        *(("intermediate_size", "48"), ("num_attention_heads", True), ("max_position_embeddings", 10**400)),
        *(("tie_word_embeddings", "false"), ("rms_norm_eps", "1e-5"), ("rope_scaling", []), ("rope_theta", 0)),
        *(("layer_types", "full_attention"), ("model_type", ["llama"]), ("head_dim", -8)),
    ],
)
def test_a_configuration_is_refused_by_file_and_key_before_anything_is_built(copy: Path, key: str, value: Any) -> None:
    change(copy / "config.json", lambda content: content.update({key: value}))
    started = time.process_time()
    assert_refused(run("generate", "--model", copy, "--prompt", "up"), f"{copy / 'config.json'}: {key} is ")
    assert_refused(run("random_checkpoint", copy / "config.json", "--out", copy / "new"), f"config.json: {key} is ")
    assert time.process_time() - started < 5 and not (copy / "new").exists()


def test_more_layers_than_the_file_has_are_told_by_its_tensors(copy: Path) -> None:
    change(copy / "config.json", lambda content: content.update(num_hidden_layers=4000))
    assert_refused(run("generate", "--model", copy, "--prompt", "up"), str(copy), "missing: model.layers.2.")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "add_bos_token", "true"),
        ("tokenizer_config.json", "eos_token", ["<|endoftext|>"]),
        ("tokenizer_config.json", "chat_template", 3),
        ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
        ("special_tokens_map.json", "bos_token", {"content": 3}),
        ("generation_config.json", "eos_token_id", [[0]]),
    ],
)
def test_a_tokenizers_file_is_refused_by_file_and_key(copy: Path, name: str, key: str, value: Any) -> None:
    change(copy / name, lambda content: content.update({key: value}))
    assert_refused(run("generate", "--model", copy, "--prompt", "up"), f"{copy / name}: {key} is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("use_rslora", "False"), ("use_dora", "no"), ("r", "8"), ("r", 10**12), ("lora_alpha", "16")),
        *(("target_modules", {"q_proj": 1}), ("target_modules", [1]), ("rank_pattern", ["q_proj"])),
        *(("rank_pattern", {"q_proj": True}), ("layers_to_transform", [True]), ("layers_to_transform", -1)),
        *(("peft_type", ["LORA"]), ("base_model_name_or_path", 3), ("revision", {})),
    ],
)
def test_an_adapters_configuration_is_refused_by_file_and_key(
    model: Path, adapter: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change(folder / "adapter_config.json", lambda content: content.update({key: value}))
    result = run("generate", "--model", model, "--adapter", folder, "--prompt", "up")
    assert_refused(result, f"{folder / 'adapter_config.json'}: {key} is ")


# --- Regular expressions ---


def test_an_expression_takes_a_bounded_time_and_an_odd_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "SECONDS", 0.05)
    assert not matches(r"([a-z_.0-9]+)+!", "model.layers.0.self_attn.q_proj")
    assert matches(r"model\.layers\.\d+\.(?!mlp).*", "model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="takes too long on"):
        matches("(?R)", "model.layers.0.self_attn.q_proj")
    for odd in ("(", "(" * 5000 + ")" * 5000, "a" * 20_000, "a{99999999999}"):
        with pytest.raises(ValueError, match="is not a regular expression"):
            matches(odd, "a")


@pytest.mark.parametrize(("key", "wrap"), [("target_modules", str), ("rank_pattern", lambda p: {p: 2})])
def test_an_adapters_expression_is_told_by_file(
    model: Path, adapter: Path, tmp_path: Path, key: str, wrap: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SECONDS", 0.05)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for expression, told in (("(", "is not a regular expression"), ("(?R)", "takes too long")):
        change(folder / "adapter_config.json", lambda content, e=expression: content.update({key: wrap(e)}))
        result = run("generate", "--model", model, "--adapter", folder, "--prompt", "up")
        assert_refused(result, str(folder / "adapter_config.json"), told)


def test_an_expression_on_the_command_line_is_told(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = ("--model", model, "--data", rows, "--out", tmp_path / "run", "--steps", 1)
    for name, value in (("--target-modules", "(proj"), ("--exclude-modules", "(proj"), ("--rank-pattern", "(=3")):
        assert_refused(run("train", *flags, name, value), "is not a regular expression")


def test_a_tokenizers_expression_that_tries_for_ever_is_told(copy: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(copy / "tokenizer.json", lambda content: content.update(pre_tokenizer=split))
    assert_refused(run("generate", "--model", copy, "--prompt", "a" * 40 + "!"), f"{copy}, tokenizer.json")


# --- Chat templates ---

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_command_names_the_folder_of_a_template_that_takes_too_long(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    (copy / "chat_template.jinja").write_text(ENDLESS)
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in CHATS])
    told = f"{copy}: the chat template refuses the messages: it takes more than"
    assert_refused(run("generate", "--model", copy, "--chat", "--prompt", "up"), told)
    assert_refused(run("train", "--model", copy, "--data", rows, "--out", tmp_path / "run"), "rows.jsonl, line 1", told)


def test_a_template_that_writes_nothing_is_told(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{# nothing #}")
    assert_refused(run("generate", "--model", copy, "--chat", "--prompt", "up"), f"{copy}: the chat template writes")


# --- Links ---


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_no_file_from_outside_the_models_folder_is_copied_beside_weights(
    copy: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((copy / name).read_bytes() if (copy / name).exists() else b"{}")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    told = f"{copy / name} is a link out of the model's folder, to {secret.resolve()}"
    for command, *flags in (
        ("merge", "--model", copy, "--adapter", adapter),
        ("convert", "--model", copy),
        ("train", "--model", copy, "--data", rows, "--method", "full", "--steps", 1),
        ("random_checkpoint", copy / "config.json", "--tokenizer", copy),
    ):
        assert_refused(run(command, *flags, "--out", tmp_path / "out"), told)
        assert not (tmp_path / "out").exists()
    assert good("generate", "--model", copy, "--prompt", "up", "--max-tokens", 1)  # to read is no harm


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_within_a_folder_and_those_of_the_hubs_cache_are_copied(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    within = Path(shutil.copytree(model, tmp_path / "within"))
    (within / "tokenizer.json").rename(within / "other.json")
    (within / "tokenizer.json").symlink_to("other.json")
    for number, folder in enumerate((snapshot, within)):
        good("merge", "--model", folder, "--adapter", adapter, "--out", tmp_path / f"out{number}")
        copied = tmp_path / f"out{number}" / "tokenizer.json"
        assert not copied.is_symlink() and copied.read_bytes() == (model / "tokenizer.json").read_bytes()


# --- GGUF ---


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("count", [2**40, 2**63])
def test_a_gguf_file_that_says_it_holds_more_than_it_does_is_told_at_once(tmp_path: Path, count: int) -> None:
    good("convert", "--model", write_model(tmp_path / "m"), "--format", "gguf", "--out", tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for name in (b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens"):
        at = whole.index(name) + len(name) + 8  # after the types of field and entries
        (tmp_path / "model.gguf").write_bytes(whole[:at] + count.to_bytes(8, "little") + whole[at + 8 :])
        result = run("generate", "--model", tmp_path / "model.gguf", "--prompt", "a")
        assert_refused(result, f"{tmp_path / 'model.gguf'}: not a whole GGUF file")


# --- Standard output, and folders of others ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["a full disk", "a closed pipe"])
def test_output_that_cannot_be_written_is_told_in_a_line(model: Path, tmp_path: Path, where: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    train = ("train", "--model", model, "--data", rows, "--steps", 1, "--eval-rows", 0, "--out", tmp_path / "run")
    for command in (("generate", "--model", model, "--prompt", "up", "--max-tokens", 2), train):
        if where == "a full disk":
            with open("/dev/full", "w") as full:
                child = process(*command, stdout=full)
                err = child.communicate()[1]
        else:
            child = process(*command)
            child.stdout.close()
            child.stdout = None
            err = child.communicate()[1]
        complaints = [line for line in err.splitlines() if "error: standard output cannot be written" in line]
        assert child.returncode == 2 and len(complaints) == 1 and err.endswith(complaints[0] + "\n"), err


def test_compare_and_pretrain_write_into_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert_refused(run("compare", "--methods", "lora", "--out", tmp_path), f"--out {tmp_path} holds files")
    assert_refused(run("pretrain", "--out", tmp_path), f"--out {tmp_path} exists")
    (tmp_path / "run" / "text").mkdir(parents=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "run"]


def test_compare_has_no_use_for_a_single_method(tmp_path: Path) -> None:
    for flags in (("--method", "dora"), ("--fine-tune-type", "dora")):
        assert_refused(run("compare", *flags, "--out", tmp_path / "out"), "--methods")
    assert not (tmp_path / "out").exists() and (REPOSITORY / "setup.cfg").exists()
