"""What the flags of a training run come to, in bytes and FLOPs: the figures behind `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from minilora.counting.activations import Work
from minilora.counting.flops import step_flops
from minilora.counting.footprint import Storage, footprint
from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import read_layout
from minilora.formats.checkpoint import DTYPES, read_config, read_config_file
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.known_configs import GPT_3, KNOWN_CONFIGS
from minilora.formats.load import SHIPPED_MODEL
from minilora.formats.sizes import checkpoint_bytes, numbers, saved_bytes, trainable_shapes
from minilora.methods.full import Full
from minilora.methods.method import Method
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.model.config import Config
from minilora.model.names import parameter_count
from minilora.runs.settings import Settings
from minilora.training.side_by_side import shares

SHAPES = KNOWN_CONFIGS | {"GPT-3": GPT_3}


class Job(NamedTuple):
    """A training run, as far as its size is concerned."""

    name: str  # of the model, for people
    settings: Settings
    config: Config
    folder: Path | None  # of the checkpoint, where there is one
    method: Method
    work: Work  # of a micro-batch
    storage: Storage


def make_job(settings: Settings, labelled: float) -> Job:
    """Full rows, of whose tokens the share `labelled` has a label. ValueError or OSError where flags make no sense."""
    if not 0 < labelled <= 1:
        raise ValueError(f"--labelled {labelled} is not above 0 and at most 1")
    name, config, raw, folder = find_shape(settings)
    method = find_method(settings, config)
    virtual = method.num_virtual_tokens if isinstance(method, PrefixTuning | PromptTuning) else 0
    length = settings.max_length or min(config.max_position_embeddings - virtual, 1024)
    if length < 2:
        raise ValueError(f"--max-length {length}: it takes two tokens to predict one")
    rows = settings.batch_size
    tokens = max(1, round(labelled * rows * (length - 1)))  # what follows the last token of a row is unknown
    stored = raw.get("dtype") or raw.get("torch_dtype")
    storage = Storage(
        settings.dtype,
        settings.frozen,
        stored if stored in DTYPES else "float32",
        settings.mixed_precision,
    )
    return Job(name, settings, config, folder, method, Work(rows, length, tokens), storage)


def find_shape(settings: Settings) -> tuple[str, Config, dict[str, Any], Path | None]:
    """What `--model` names: its name, its configuration and config.json, and the folder if its weights are there."""
    path = Path(settings.model)
    if path.name in SHAPES and not path.exists():
        return path.name, Config.from_dict(SHAPES[path.name]), SHAPES[path.name], None
    if path.is_file():
        return str(path), *read_config_file(path), None
    try:
        folder = find_model(settings.model, settings.revision, ("config.json",)).folder
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; nor a known shape: {', '.join(SHAPES)}") from error
    return settings.model, *read_config(folder), folder if any(folder.glob("*.safetensors")) else None


def find_method(settings: Settings, config: Config) -> Method:
    """The method; of an adapter that training starts from, its own."""
    if settings.adapter:
        return read_layout(find_adapter(settings.adapter).folder, config).method
    words = Tokenizer.load(SHIPPED_MODEL)  # for --init-text, which says where virtual tokens start, not how many
    return settings.method.for_model(config, words.encode)


def plan(job: Job) -> dict[str, Any]:
    """The figures of the run, and beside them those of full fine-tuning on the same rows."""
    return {
        "model": job.name,
        "settings": job.settings.values(),
        "parameters": parameter_count(job.config),
        "checkpoint_file": checkpoint_bytes(job.config, job.storage.file),
        "work": job.work._asdict(),
        "this": figures(job, job.method),
        "full": figures(job, Full()),
    }


def figures(job: Job, method: Method) -> dict[str, Any]:
    """Bytes and FLOPs of a step of such a method, and the bytes of the file that it leaves."""
    settings, storage = job.settings, job.storage
    if isinstance(method, Full) and storage.frozen == "nf4":
        storage = storage._replace(frozen="stored")  # train refuses what cannot be trained
    if isinstance(method, Full):
        storage = storage._replace(mixed_precision="no")  # nothing is frozen
    checkpointing, micro_batches = settings.activation_checkpointing, settings.grad_accumulation
    parts = 1 if settings.device == "cuda" else shares(job.work.rows)
    memory = footprint(job.config, method, job.work, storage, settings.optimizer, checkpointing, micro_batches, parts)
    passes = step_flops(job.config, method, job.work, checkpointing)
    forward, backward = ({part: micro_batches * n for part, n in one._asdict().items()} for one in passes)
    total = sum(forward.values()) + sum(backward.values())
    written = "float32" if isinstance(method, Full) else settings.dtype  # a whole checkpoint is always float32
    return {
        "trainable_parameters": numbers(trainable_shapes(method, job.config)),
        "memory": {
            **memory._asdict(),
            "fullest": memory.fullest,
            "between_steps": memory.between_steps,
            "total": memory.total,
        },
        "saved_file": saved_bytes(method, job.config, written),
        "flops": {"forward": forward, "backward": backward, "total": total},
        "head_share": (forward["head"] + backward["head"]) / total,
    }
