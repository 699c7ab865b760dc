"""Models and adapters by name: the cache of the Hugging Face Hub, laid out here as its library lays it out."""

from __future__ import annotations

import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import ADAPTER, CONFIG, PAIRS, TEXTS, assert_refused, good, process, read, run, write_rows

from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.hub import ADAPTER_FILES, MODEL_FILES, Source, find_adapter, find_model, is_hub_id
from minilora.model.config import Config

hub = pytest.importorskip("huggingface_hub")

OLD, NEW, ADAPTED = "1" * 40, "2" * 40, "3" * 40


def snapshot(cache: Path, hub_id: str, commit: str, branch: str) -> Path:
    """A new snapshot of a repository, at the commit that a branch or tag points to."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two commits of someone/tiny, the second on main, and with someone/adapter."""
    cache = tmp_path_factory.mktemp("cache")
    for seed, (commit, branch) in enumerate([(OLD, "v1"), (NEW, "main")]):
        folder = snapshot(cache, "someone/tiny", commit, branch)
        write_checkpoint(folder, CONFIG, random_weights(Config.from_dict(CONFIG), seed, std=0.3), "float32")
        train_tokenizer(TEXTS * 3, CONFIG["vocab_size"], folder)
        for path in [*folder.iterdir()]:  # in a real cache, names are links to blobs
            blob = cache / "models--someone--tiny" / "blobs" / f"{commit}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            path.rename(blob)
            path.symlink_to(blob)
    good("train", "--model", folder, "--data", write_rows(cache / "rows.jsonl", PAIRS), "--out", cache / "run",
         "--rank", 2, "--steps", 30, "--learning-rate", 0.02, "--eval-rows", 0)  # fmt: skip
    folder = snapshot(cache, "someone/adapter", ADAPTED, "main")
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copyfile(cache / "run" / name, folder / name)
    return cache


@pytest.fixture
def cache(filled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """That cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(filled))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return filled


def refusing(error: str, status: int) -> Any:
    """A snapshot_download that the server refuses."""

    def snapshot_download(hub_id: str, **_: Any) -> str:
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise getattr(hub.errors, error)("No.\n\nAnd a second line.", response=response)

    return snapshot_download


# --- What a name means ---


def test_a_folder_that_exists_wins_and_an_id_has_one_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("someone/tiny", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d", "a/b@v1", "a/b@refs/pr/1"):
        assert is_hub_id(name)
    for name in ("tiny", "/tmp/tiny", "./tiny", "../tiny", "a/b/c", "a\\b", "a/", "/a", "a b/c", "", "~/tiny"):
        assert not is_hub_id(name)
    Path("someone/tiny").mkdir(parents=True)
    assert not is_hub_id("someone/tiny")
    assert find_model("someone/tiny") == Source(Path("someone/tiny"))


def test_a_name_is_the_commit_that_its_branch_or_tag_points_to(cache: Path) -> None:
    assert find_model("someone/tiny").revision == find_model("someone/tiny", "main").revision == NEW
    for old in (find_model("someone/tiny", "v1"), find_model("someone/tiny@v1"), find_model("someone/tiny", OLD)):
        assert old == Source(cache / "models--someone--tiny" / "snapshots" / OLD, "someone/tiny", OLD)
    assert find_model(find_model("someone/tiny@v1").name) == find_model("someone/tiny@v1")
    assert find_adapter("someone/adapter").folder.name == ADAPTED


def test_only_what_is_needed_is_fetched_and_no_pickle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.append({"id": hub_id, **options})
        return str(cache / "models--someone--tiny" / "snapshots" / NEW)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    find_model("someone/tiny", "v1")
    find_adapter("someone/tiny")
    assert asked == [
        {"id": "someone/tiny", "revision": "v1", "allow_patterns": list(MODEL_FILES)},
        {"id": "someone/tiny", "revision": None, "allow_patterns": list(ADAPTER_FILES)},
    ]
    for name in (*TOKENIZER_FILES, "config.json", "model.safetensors", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json"):  # fmt: skip
        assert any(fnmatch(name, pattern) for pattern in MODEL_FILES), name
    for name in ("pytorch_model.bin", "model.pkl", "adapter_model.bin", "onnx/model.onnx", "modeling_tiny.py",
                 "consolidated.safetensors", "runs/model.safetensors"):  # fmt: skip
        assert not any(fnmatch(name, pattern) for pattern in (*MODEL_FILES, *ADAPTER_FILES)), name


# --- In the commands ---


def test_training_pins_the_commit_and_resuming_takes_it_though_the_branch_has_moved(cache: Path) -> None:
    flags = ["--model", "someone/tiny", "--data", cache / "rows.jsonl", "--steps", 4, "--eval-rows", 0]
    main = cache / "models--someone--tiny" / "refs" / "main"
    main.write_text(OLD)
    try:
        good("train", *flags, "--out", "run")
    finally:
        main.write_text(NEW)
    settings, config = read(Path("run/settings.json")), read(Path("run/adapter_config.json"))
    assert (settings["model"], settings["revision"]) == ("someone/tiny", OLD)
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", OLD)
    loss = read(Path("run/summary.json"))["base_loss"]
    Path("run/summary.json").unlink()
    good("train", "--resume", "run")
    assert read(Path("run/summary.json"))["base_loss"] == loss
    good("train", *flags, "--out", "new")
    assert read(Path("new/settings.json"))["revision"] == NEW
    assert read(Path("new/summary.json"))["base_loss"] != loss


def test_every_command_takes_a_model_and_an_adapter_by_name(cache: Path) -> None:
    model, adapter = find_model("someone/tiny").folder, find_adapter("someone/adapter").folder
    by_name = ["--model", "someone/tiny", "--adapter", "someone/adapter"]
    by_folder = ["--model", model, "--adapter", adapter]
    prompt = ["--prompt", "up ->", "--max-tokens", 5]
    assert good("generate", *by_name, *prompt) == good("generate", *by_folder, *prompt)
    assert good("generate", *by_name, *prompt) != good("generate", "--model", "someone/tiny", *prompt)
    assert good("generate", "--model", "someone/tiny", "--revision", "v1", *prompt) == good(
        "generate", "--model", model.parent / OLD, *prompt
    )
    data = ["--data", cache / "rows.jsonl", "--json"]
    assert good("evaluate", *by_name, *data) == good("evaluate", *by_folder, *data)
    good("merge", *by_name, "--out", "by-name")
    good("merge", *by_folder, "--out", "by-folder")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert Path("by-name", name).read_bytes() == Path("by-folder", name).read_bytes()
    good("train", *by_name, "--data", cache / "rows.jsonl", "--steps", 1, "--learning-rate", 0, "--out", "run")
    assert read(Path("run/settings.json"))["adapter"] == f"someone/adapter@{ADAPTED}"
    assert Path("run", ADAPTER).read_bytes() == (adapter / ADAPTER).read_bytes()
    good("train", "--resume", "run")


def test_full_fine_tuning_of_a_model_by_name_leaves_a_model_folder(cache: Path) -> None:
    good("train", "--model", "someone/tiny", "--method", "full", "--data", cache / "rows.jsonl", "--steps", 1,
         "--out", "run", "--eval-rows", 0)  # fmt: skip
    assert good("generate", "--model", "run", "--prompt", "up ->", "--max-tokens", 3)


def test_the_cache_is_found_by_a_process_of_its_own(filled: Path) -> None:
    places = {"HF_HUB_CACHE": str(filled), "HF_HUB_OFFLINE": "1"}
    child = process("generate", "--model", "someone/tiny", "--prompt", "up ->", env=os.environ | places)
    out, err = child.communicate()
    assert child.returncode == 0 and out.endswith("\n"), err


# --- Mistakes ---


def test_a_name_that_cannot_be_found_is_told_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, flags, named in (
        ("train", ["--model", "nowhere"], ["--model ", "nowhere: no such folder"]),
        ("train", ["--model", "no/where/at-all"], ["--model ", "no/where/at-all: no such folder"]),
        ("generate", ["--model", "someone/else"], ["--model someone/else", "no such folder", "HF_HUB_OFFLINE"]),
        ("generate", ["--model", "someone/tiny", "--revision", "v9"], ["someone/tiny at v9", "cache"]),
        ("generate", ["--adapter", "someone/else"], ["--adapter someone/else", "cache"]),
        ("generate", ["--revision", "v1"], ["--revision v1", "Hub"]),
        ("generate", ["--model", "someone/tiny@v1", "--revision", "v1"], ["@v1", "--revision v1", "give one"]),
        ("merge", ["--adapter", "someone/else", "--out", "merged"], ["--adapter someone/else"]),
        ("evaluate", ["--model", "someone/else"], ["--model someone/else"]),
    ):
        assert_refused(run(command, *(["--prompt", "up"] if command == "generate" else []), *flags), *named)
        assert not Path("merged").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("error", "status", "named"),
    [
        ("GatedRepoError", 403, ["agreement", "https://huggingface.co/someone/gone", "HF_TOKEN"]),
        ("RepositoryNotFoundError", 404, ["neither a folder here nor a repository", "HF_TOKEN"]),
        ("RevisionNotFoundError", 404, ["someone/gone at v9", "no such revision"]),
        ("HfHubHTTPError", 500, ["someone/gone", "No."]),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: str, status: int, named: list[str]
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", refusing(error, status))
    result = run("generate", "--model", "someone/gone", "--revision", "v9", "--prompt", "up")
    assert_refused(result, "--model someone/gone", *named)


def test_without_the_library_the_advice_is_to_install_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(run("generate", "--model", "someone/tiny", "--prompt", "up"), "pip install 'minilora[hub]'")


def test_a_repository_without_safetensors_is_refused(cache: Path) -> None:
    folder = snapshot(cache, "someone/pickled", "4" * 40, "main")
    shutil.copyfile(find_model("someone/tiny").folder / "config.json", folder / "config.json")
    assert_refused(run("generate", "--model", "someone/pickled", "--prompt", "up"), "model.safetensors")
