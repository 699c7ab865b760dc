"""Files and folders appear whole or not at all, and one process at a time writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.formats.files import write_safetensors, write_text
from minilora.formats.whole import building, check_new, replacing

HOLDER = """
import sys, time
from pathlib import Path
from minilora.formats.whole import building, replacing
with {how}(Path(sys.argv[1])) as partial:
    (partial / "half" if {how} is building else partial).write_text("half")
    print("holds", flush=True)
    time.sleep(60)
"""


def holding(how: str, path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `path`."""
    program = [sys.executable, "-c", HOLDER.format(how=how), str(path)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_and_a_folder_appear_at_the_end_of_their_block_and_nothing_stays_beside_them(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as partial:
        partial.write_text("whole")
        assert "file" not in names(tmp_path)
    with building(tmp_path / "folder") as folder:
        (folder / "inside").write_text("whole")
        assert "folder" not in names(tmp_path)
    assert names(tmp_path) == {"file", "folder"} and names(tmp_path / "folder") == {"inside"}


def test_whatever_a_killed_writer_leaves_its_next_removes(tmp_path: Path) -> None:
    """A library may write under names of its own, as safetensors does, and be killed there."""
    path, beside = tmp_path / "file", tmp_path / ".file.partial"
    beside.mkdir()
    (beside / ".tmpaR9x2c").touch()
    write_safetensors(path, {"x": np.ones(3)})
    beside.touch()  # an earlier version wrote a file
    write_text(path, "whole")
    assert names(tmp_path) == {"file"}


def test_the_library_never_works_where_others_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(tensors: object, path: Path, metadata: object) -> None:
        assert names(tmp_path) == {".file.partial", ".file.lock"}
        assert path.parent == tmp_path / ".file.partial"

    monkeypatch.setattr("minilora.formats.files.save_file", saved)
    write_safetensors(tmp_path / "file", {"x": np.ones(3)})


def test_a_block_that_fails_leaves_what_was_there_before(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KeyError), replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), building(tmp_path / "folder") as folder:
        (folder / "inside").write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_text() == "before"
    assert names(tmp_path) == {"file", "folder"} and not names(tmp_path / "folder")


@pytest.mark.parametrize("how", ["replacing", "building"])
def test_a_second_writer_is_refused_and_a_killed_one_is_in_nobodys_way(how: str, tmp_path: Path) -> None:
    path, first = tmp_path / "out", holding(how, tmp_path / "out")
    try:
        with pytest.raises(OSError, match="out is being written by another process"):
            with {"replacing": replacing, "building": building}[how](path):
                raise AssertionError("two writers at once")
    finally:
        first.kill()
        first.communicate()
    assert "out" not in names(tmp_path) and names(tmp_path), "the kill leaves what was half written"
    if how == "replacing":
        write_text(path, "whole")
        assert path.read_text() == "whole"
    else:
        with building(path) as folder:
            assert not names(folder)
            (folder / "inside").touch()
    assert names(tmp_path) == {"out"}


def test_a_folder_takes_the_place_only_of_a_new_or_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_new(tmp_path / "new")
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            check_new(taken)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="name a new one in it"):
        check_new(Path("."))


def test_a_folder_that_was_filled_meanwhile_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="out cannot be written"), building(tmp_path / "out") as folder:
        (folder / "inside").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "foreign").touch()
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"foreign"}


@pytest.mark.skipif(os.name == "nt", reason="limits and signals")
@pytest.mark.parametrize("writer", ["write_text(path, 'x' * 9999)", "write_safetensors(path, {'x': np.ones(9999)})"])
def test_an_error_of_the_disk_names_the_file_and_leaves_the_old_one(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    program = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from minilora.formats.files import write_safetensors, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1])
try:
    {writer}
except OSError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{path} cannot be written (") and "has room" in found.stdout, found.stderr
    assert path.read_text() == "before" and names(tmp_path) == {"file"}
