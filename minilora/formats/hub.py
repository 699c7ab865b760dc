"""Models and adapters by name: a folder, a GGUF file, or a repository of the Hugging Face Hub.

Repositories are fetched into the cache that all tools share. Without a network, or with HF_HUB_OFFLINE=1, that cache is
all there is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

MODEL_FILES = (  # no pickles: weights come as safetensors or not at all
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
HUB_ID = re.compile(r"[a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*(@.+)?", re.ASCII)


class Source(NamedTuple):
    """The place of a model or adapter that the user named. `hub_id` and `revision` are empty for a folder."""

    folder: Path  # of a model, it may be one file in the GGUF format instead
    hub_id: str = ""
    revision: str = ""  # the commit, whatever branch or tag was asked for

    @property
    def name(self) -> str:
        """A name that finds exactly this again."""
        return f"{self.hub_id}@{self.revision}" if self.hub_id else str(self.folder)


def is_hub_id(name: str) -> bool:
    """Whether `name` is like `owner/name` or `owner/name@revision`. A folder that exists wins; a .gguf is a file."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not name.endswith(".gguf")


def find_model(name: str, revision: str = "", files: tuple[str, ...] = MODEL_FILES) -> Source:
    """The folder, with at least these files, that `--model` and `--revision` (a branch, a tag, a commit) name."""
    if revision and not is_hub_id(name):
        raise ValueError(f"--revision {revision} goes with a model of the Hugging Face Hub, and --model {name} is none")
    return _find("--model", name, revision, files)


def find_adapter(name: str) -> Source:
    """The adapter folder that `--adapter` names."""
    return _find("--adapter", name, "", ADAPTER_FILES)


def _find(flag: str, name: str, revision: str, files: tuple[str, ...]) -> Source:
    if not is_hub_id(name):
        if not Path(name).exists():
            if name.endswith(".gguf"):
                raise FileNotFoundError(f"{flag} {name}: no such file")
            hint = "and not an id of the Hugging Face Hub, such as HuggingFaceTB/SmolLM2-135M"
            raise FileNotFoundError(f"{flag} {name}: no such folder, {hint}")
        return Source(Path(name))
    hub_id, _, suffix = name.partition("@")
    if suffix and revision:
        raise ValueError(f"{flag} {name} names a revision, and so does --revision {revision}: give one")
    snapshot = _download(flag, hub_id, revision or suffix, files)
    return Source(snapshot, hub_id, snapshot.name)


def _download(flag: str, hub_id: str, revision: str, files: tuple[str, ...]) -> Path:
    """The repository's snapshot in the cache: a folder named after its commit."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{flag} {hub_id}: no such folder; to fetch it from the Hugging Face Hub: pip install 'minilora[hub]'"
        ) from None
    at = f"{hub_id} at {revision}" if revision else hub_id
    page = f"https://huggingface.co/{hub_id}"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=list(files)))
    except errors.GatedRepoError:
        problem = f"its owner asks for an agreement: give it on {page}, then `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = f"there is no such revision: see {page}/commits"
    except errors.RepositoryNotFoundError:
        problem = (
            "neither a folder here nor a repository of the Hugging Face Hub that you may see; if it is private: "
            "`hf auth login` or set HF_TOKEN"
        )
    except errors.LocalEntryNotFoundError:
        reason = (
            "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the network cannot be reached"
        )
        problem = f"no such folder, and not whole in the cache of the Hugging Face Hub, while {reason}"
    except Exception as error:  # the network's own, of whatever library carries it
        problem = f"the Hugging Face Hub answers: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    raise FileNotFoundError(f"{flag} {at}: {problem}")
