"""The same flags give the same bytes on any number of ranks: they define a step, and ranks only share it out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.commands import PAIRS, write_rows
from support.on_ranks import left_in, many_runs, needs_mpi, on_ranks, train

from minilora.methods.method import known_methods
from minilora.runs.state_file import STATE_FILE
from minilora.training.optimizers import OPTIMIZERS

pytestmark = needs_mpi

# 8 rows of unequal length make a step of 3 micro-batches of 2 rows, and a last one of a single micro-batch.
STEPS = ("--steps", 3, "--batch-size", 2, "--grad-accumulation", 3, "--eval-every", 2, "--save-every", 2)
CLIPPED = ("--max-grad-norm", 0.05, "--learning-rate", 0.01)
METHODS = {name: ("--method", name, "--untie") for name in known_methods()}
WAYS: dict[str, Sequence[object]] = {
    "dropout": ("--dropout", 0.3),
    "packing": ("--packing", "--max-length", 40),
    "checkpointing": ("--activation-checkpointing", "--dropout", 0.2),
    "not clipped": ("--max-grad-norm", 0),
    "one micro-batch": ("--grad-accumulation", 1, "--batch-size", 6),
    "five micro-batches": ("--grad-accumulation", 5, "--batch-size", 1),
    "float64": ("--dtype", "float64"),
    "bf16": ("--mixed-precision", "bf16"),
    "fp16": ("--mixed-precision", "fp16"),
    "patience": ("--patience", 1, "--learning-rate", 3),
    **{name: ("--optimizer", name) for name in OPTIMIZERS},
}


def cases(model: Path, data: Path, flags: dict[str, Sequence[object]]) -> dict[str, Sequence[object]]:
    common = ("--model", model, "--data", data / "uneven", *STEPS, *CLIPPED)
    return {name.replace(" ", "-"): (*common, *own) for name, own in flags.items()}


@pytest.fixture(scope="module")
def uneven(data: Path) -> Path:
    words = "one two three four five six seven eight".split()
    for part, start, count in (("train", 0, 8), ("valid", 3, 3), ("test", 5, 3)):
        texts = [" and ".join(words[start : start + 1 + i % 5]) for i in range(count)]
        write_rows(data / "uneven" / f"{part}.jsonl", [{"text": text} for text in texts])
    return data


THREADS: dict[str, Sequence[object]] = {"two threads": ("--dropout", 0.3)}


@pytest.mark.parametrize(
    ("flags", "threads"), [(METHODS, 1), (WAYS, 1), (THREADS, 2)], ids=["methods", "ways", "threads"]
)
def test_the_same_command_leaves_the_same_bytes_on_any_number_of_ranks(
    flags: dict[str, Sequence[object]], threads: int, model: Path, uneven: Path, tmp_path: Path
) -> None:
    runs = cases(model, uneven, flags)
    alone = many_runs(1, tmp_path / "1", runs, threads)
    for ranks in (2, 3):
        shared = many_runs(ranks, tmp_path / str(ranks), runs, threads)
        for name, left in alone.items():
            for what, content in left.items():
                assert shared[name][what] == content, f"{name} on {ranks} ranks: {what}"
    if flags is METHODS:
        norms = [line["grad_norm"] for line in alone["lora"]["metrics"] if "grad_norm" in line]
        assert min(norms) > 0.05, "every step of LoRA is clipped"


def test_a_run_that_was_cut_off_goes_on_with_another_number_of_ranks_to_the_same_bytes(
    model: Path, uneven: Path, tmp_path: Path
) -> None:
    flags = next(iter(cases(model, uneven, {"dropout": ("--dropout", 0.3)}).values()))
    assert train(1, *flags, "--out", tmp_path / "whole")[0] == 0
    stopped = """
import sys
from minilora.cli.errors import run_on_ranks
from minilora.runs import run as runs
from minilora.train import train_command
def stop_after(step):
    from contextlib import contextmanager
    @contextmanager
    def stopping():
        yield lambda: 15 if current["state"].step >= step else 0
    return stopping
current = {}
train_in = runs.train_in
def noting(folder, model, state, *rest):
    current["state"] = state
    return train_in(folder, model, state, *rest)
runs.train_in, runs.stopping = noting, stop_after(int(sys.argv[1]))
sys.exit(run_on_ranks(train_command, sys.argv[2:]))
"""
    cut = tmp_path / "cut"
    code, out, err = on_ranks(3, ["-c", stopped, 1, *flags, "--out", cut])
    assert code == 143 and "stopped after step 1, which is saved" in out, err
    assert on_ranks(1, ["-c", stopped, 2, "--resume", cut])[0] == 143
    code, out, err = train(2, "--resume", cut)
    assert code == 0 and "2 of them done" in out, err
    assert left_in(cut) == left_in(tmp_path / "whole")


def test_rank_0_alone_prints_and_the_summary_says_what_each_rank_held_and_sent(
    model: Path, uneven: Path, tmp_path: Path
) -> None:
    flags = next(iter(cases(model, uneven, {"lora": ()}).values()))
    code, out, err = train(3, *flags, "--out", tmp_path / "run")
    assert code == 0, err
    assert out.count("before training") == out.count("held-out loss") == 1 and "3 ranks of 1 threads" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    numbers = summary["trainable_parameters"]
    ranks = summary["ranks"]
    assert ranks["size"] == len(ranks["peak_memory_bytes_of_each"]) == 3 and min(ranks["peak_memory_bytes_of_each"]) > 0
    arrays = 2 * 7 * 2  # A and B of seven maps in two layers, each filled up to 64 bytes
    assert 64 + 4 * numbers <= ranks["message_bytes"] <= 64 + 4 * numbers + 64 * arrays
    assert (tmp_path / "run" / STATE_FILE).exists()


def test_fewer_micro_batches_than_ranks_are_told_with_the_flags_that_make_more(
    model: Path, uneven: Path, tmp_path: Path
) -> None:
    flags = ("--model", model, "--data", uneven / "uneven", "--steps", 1, "--batch-size", 6)
    code, _, err = train(3, *flags, "--out", tmp_path / "few")
    assert code == 0
    assert "1 micro-batch for 3 ranks" in err and "--batch-size 2 --grad-accumulation 3" in err
    code, _, err = train(3, *flags[:-2], "--batch-size", 2, "--grad-accumulation", 3, "--out", tmp_path / "enough")
    assert code == 0 and "remark" not in err


def threads_of(out: str) -> list[list[int]]:
    """The list that each rank has printed; they may stand on one line."""
    return [json.loads(found) for found in re.findall(r"\[[^\]]*\]", out)]


def test_the_ranks_of_a_machine_share_out_its_cores() -> None:
    program = """
from minilora.backend import cores
from minilora.training.ranks import join
print(join().gather(cores()))
"""
    ((one,),) = threads_of(on_ranks(1, ["-c", program], threads=0)[1])
    for ranks in (2, 3):
        threads, *others = threads_of(on_ranks(ranks, ["-c", program], threads=0)[1])
        assert all(found == threads for found in others) and len({*threads}) == 1 and len(threads) == ranks
        assert 1 <= threads[0] <= max(1, one // ranks)


def test_evaluate_shares_out_its_rows_to_the_same_figures(model: Path, data: Path, adapter: Path) -> None:
    flags = ("--model", model, "--adapter", adapter, "--data", data / "pairs.jsonl", "--batch-size", 2, "--json")
    found = [on_ranks(ranks, ["-m", "minilora.evaluate", *flags]) for ranks in (1, 3)]
    assert found[0][0] == 0 and found[0] == found[1], found


def test_answers_are_shared_out_and_are_those_of_one_process(model: Path, data: Path, adapter: Path) -> None:
    program = f"""
from minilora import load, load_adapter
from minilora.runs.evaluation import answers
from minilora.training.ranks import join
ranks = join()
model, tokenizer = load({str(model)!r})
rows = {[*PAIRS, *PAIRS[:2]]!r}
done = []
texts = answers(load_adapter(model, {str(adapter)!r}), tokenizer, rows, batch_size=2, on_batch=done.append)
assert sum(done) == len(rows)
assert all(text == texts for text in ranks.gather(texts))
if ranks.is_first:
    print(texts)
"""
    found = {ranks: on_ranks(ranks, ["-c", program]) for ranks in (1, 2, 3)}
    assert all(code == 0 for code, *_ in found.values()), found
    assert len({out for _, out, _ in found.values()}) == 1 and "UP" in found[1][1]
