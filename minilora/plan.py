"""What a training run takes, counted before it is begun: memory, the adapter's file, arithmetic. Nothing is allocated.

Put `plan` in the place of `train` and leave the flags as they are:

    python -m minilora.plan --model SmolLM2-135M --batch-size 8 --max-length 512

--model may also be a config.json or a known shape: SmolLM2-135M, GPT-3 and others. Every row is taken to have
--max-length tokens, so this is the most that the run can take. docs/plan.md says how it is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from minilora import cli, train_flags
from minilora.backend import peak_memory_bytes
from minilora.benchmarks.machine import facts
from minilora.flags import dashed
from minilora.formats.checkpoint import DTYPES, read_config, read_config_file
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.known_configs import GPT_3, KNOWN_CONFIGS
from minilora.formats.load import SHIPPED_MODEL
from minilora.formats.peft import read_adapter
from minilora.formats.sizes import checkpoint_bytes, numbers, saved_bytes, trainable_shapes
from minilora.methods import Method
from minilora.methods.full import Full
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.model.config import Config
from minilora.model.names import parameter_count
from minilora.text.tokenizer import Tokenizer
from minilora.training.flops import step_flops
from minilora.training.footprint import Storage, Work, footprint
from minilora.training.method import make_method
from minilora.training.settings import Settings

SHAPES = KNOWN_CONFIGS | {"GPT-3": GPT_3}


class Job(NamedTuple):
    """What is counted, and what `measured_step` does."""

    settings: Settings
    config: Config
    folder: Path | None  # of the checkpoint, where there is one
    method: Method
    work: Work
    storage: Storage


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `plan` alone, and those that it shares with `train`."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of python -m minilora.train are taken; its --help explains them.",
    )
    parser.add_argument("--labelled", type=float, default=1.0, metavar="SHARE", help="of the tokens, 0 to 1 (default 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, sizes in bytes")
    parser.add_argument("--measure", action="store_true", help="take one such step on the CPU, and compare")
    return parser.parse_known_args(dashed(argv))


def read_job(args: argparse.Namespace, rest: list[str]) -> Job:
    """What the flags say. ValueError or OSError for what the user can mend."""
    settings, _, _ = train_flags.choose_settings(train_flags.parse(rest, __doc__))
    if not 0 < args.labelled <= 1:
        raise ValueError(f"--labelled {args.labelled} is not above 0 and at most 1")
    config, raw, folder = find_shape(settings)
    method = find_method(settings, config)
    virtual = method.num_virtual_tokens if isinstance(method, PrefixTuning | PromptTuning) else 0
    length = settings.max_length or min(config.max_position_embeddings - virtual, 1024)
    if length < 2:
        raise ValueError(f"--max-length {length}: it takes two tokens to predict one")
    rows = settings.batch_size
    labelled = max(1, round(args.labelled * rows * (length - 1)))  # what follows a row's last token is unknown
    stored = raw.get("dtype") or raw.get("torch_dtype")
    storage = Storage(settings.dtype, settings.frozen, stored if stored in DTYPES else "float32")
    return Job(settings, config, folder, method, Work(rows, length, labelled), storage)


def find_shape(settings: Settings) -> tuple[Config, dict[str, Any], Path | None]:
    """The configuration that `--model` names, as it stands in its file, and the folder where its weights may be."""
    path = Path(settings.model)
    if path.name in SHAPES and not path.exists():
        return Config.from_dict(SHAPES[path.name]), SHAPES[path.name], None
    if path.is_file():
        return *read_config_file(path), None
    folder = find_model(settings.model, settings.revision, ("config.json",)).folder
    return *read_config(folder), folder if any(folder.glob("*.safetensors")) else None


def find_method(settings: Settings, config: Config) -> Method:
    """Of an adapter that training starts from, its own."""
    if settings.adapter:
        return read_adapter(find_adapter(settings.adapter).folder, config).settings
    words = Tokenizer.load(SHIPPED_MODEL)  # for --init-text, which decides where virtual tokens start, not their size
    return make_method(settings, config, words)


def predict(job: Job, method: Method) -> dict[str, Any]:
    """Every figure of a method at this job, in bytes, numbers and FLOPs."""
    settings, config = job.settings, job.config
    checkpointing, k = settings.activation_checkpointing, settings.grad_accumulation
    storage = job.storage
    if isinstance(method, Full) and storage.frozen == "nf4":
        storage = storage._replace(frozen="stored")  # nothing that trains can be held in 4 bits
    memory = footprint(config, method, job.work, storage, settings.optimizer, checkpointing, k)
    forward, backward = (
        {name: k * count for name, count in one._asdict().items()}
        for one in step_flops(config, method, job.work, checkpointing)
    )
    flops = sum(forward.values()) + sum(backward.values())
    return {
        "trainable_parameters": numbers(trainable_shapes(method, config)),
        "memory": memory._asdict() | {"fullest": memory.fullest, "step": memory.step, "total": memory.total},
        "saved_file": saved_bytes(method, config, settings.dtype if not isinstance(method, Full) else "float32"),
        "flops": {"forward": forward, "backward": backward, "total": flops},
        "head_share": (forward["head"] + backward["head"]) / flops,
    }


def plan(job: Job) -> dict[str, Any]:
    """The prediction for the job, beside it the same under full fine-tuning, and what belongs to neither."""
    return {
        "model": job.settings.model,
        "settings": asdict(job.settings),
        "parameters": parameter_count(job.config),
        "checkpoint_file": checkpoint_bytes(job.config, job.storage.file),
        "rows": job.work.rows,
        "length": job.work.length,
        "labelled": job.work.labelled,
        "interpreter": peak_memory_bytes(),
        "this": predict(job, job.method),
        "full": predict(job, Full()),
    }


def measure(argv: list[str], total: int) -> dict[str, int]:
    """What `measured_step` says of the same flags. ValueError where the machine is too small for it."""
    there = facts(1)["memory_bytes"]
    if there and total > 0.9 * there:
        raise ValueError(f"--measure: such a step takes {size(total)}, and this machine has {size(there)}")
    done = subprocess.run([sys.executable, "-m", "minilora.measured_step", *argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"--measure: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def size(count: float) -> str:
    """Bytes for people: 4 digits at most."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def as_text(job: Job, found: dict[str, Any]) -> str:
    """The tables."""
    this, full, settings, config = found["this"], found["full"], job.settings, job.config
    lines = [
        f"{settings.model}: {found['parameters']:,} parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}; {size(found['checkpoint_file'])} in {job.storage.file}",
        f"{settings.batch_size} rows of {job.work.length} tokens, {job.work.labelled:,} of them labelled"
        + (f", {settings.grad_accumulation} times a step" if settings.grad_accumulation > 1 else "")
        + f"; {settings.dtype}, frozen weights {settings.frozen}",
        "",
        row("", settings.method, "full", "full / " + settings.method),
    ]

    def add(name: str, a: float, b: float, show: Any = size) -> None:
        lines.append(row(name, show(a), show(b), f"{b / a:,.2f}×" if a else ""))

    def of_memory(name: str, key: str) -> None:
        add(name, this["memory"][key], full["memory"][key])

    add("parameters that train", this["trainable_parameters"], full["trainable_parameters"], lambda n: f"{n:,}")
    share = this["trainable_parameters"] / found["parameters"]
    lines.append(row("… of all", f"{share:.3%}", "100%", ""))
    lines.append("")
    of_memory("frozen weights", "weights")
    of_memory("what trains", "trainable")
    of_memory(f"optimiser's state ({settings.optimizer})", "optimizer")
    of_memory("gradients", "gradients")
    of_memory("activations", "activations")
    of_memory("a chunk of the loss", "loss_chunk")
    for moment in full["memory"]["moments"] | this["memory"]["moments"]:
        shown = [size(one["memory"]["moments"][moment]) if moment in one["memory"]["moments"] else "" for one in (this, full)]
        marks = [" ←" if moment == one["memory"]["fullest"] else "  " for one in (this, full)]
        lines.append(row(f"  at {moment}", shown[0] + marks[0], shown[1] + marks[1], ""))
    of_memory("reading the checkpoint", "loading")
    of_memory("most at any time", "total")
    lines.append(f"and about {size(found['interpreter'])} for the interpreter and its libraries")
    lines.append("")
    add("file that is saved", this["saved_file"], full["saved_file"])
    lines.append("")
    for part in this["flops"]["forward"]:
        for way in ("forward", "backward"):
            a, b = this["flops"][way][part], full["flops"][way][part]
            if a or b:
                add(f"FLOPs {way}, {part}", a, b, lambda n: f"{n:.3g}")
    add("FLOPs of a step", this["flops"]["total"], full["flops"]["total"], lambda n: f"{n:.3g}")
    add("… share of the head", this["head_share"], full["head_share"], lambda n: f"{n:.1%}")
    return "\n".join(lines)


def row(*cells: str) -> str:
    name, *others = cells
    return f"{name:38}" + "".join(f"{cell:>18}" for cell in others)


def plan_command(argv: list[str] | None = None) -> None:
    """Parse, count, perhaps measure, print."""
    args, rest = parse(argv)
    job = read_job(args, rest)
    found = plan(job)
    memory = found["this"]["memory"]
    if args.measure:
        flags = [*rest, "--labelled", str(args.labelled)]
        found["measured"] = measured = measure(flags, memory["total"])
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(as_text(job, found))
    if args.measure:
        held = memory["total"] - memory["step"]
        print()
        print(row("", "predicted", "measured", "predicted / measured"))
        for name, predicted, seen in (
            ("loading, by NumPy's account", memory["loading"], measured["loading"]),
            ("between steps", memory["weights"] + memory["trainable"] + memory["optimizer"], measured["between_steps"]),
            ("peak", memory["total"], measured["peak"]),
            ("peak, by the system's account", memory["total"] + measured["imported"], measured["resident"]),
        ):
            print(row(name, size(predicted), size(seen), f"{predicted / seen:.3f}"))


def main(argv: list[str] | None = None) -> int:
    return cli.run(plan_command, argv)


if __name__ == "__main__":
    sys.exit(main())
