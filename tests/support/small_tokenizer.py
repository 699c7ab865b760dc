"""A tokenizer as a release has it, small enough to be trained in a test, and the chat templates to go with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # 0, 1, 2, as in SmolLM
CHAT_TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parent / "chat_templates").glob("*.jinja")}
CORPUS = ["How are you? I am well, thank you.", "What is two plus two?\n\nIt is four.", "assistant user"] * 3
POST_PROCESSORS = {
    "none": None,
    "byte level": tokenizers.processors.ByteLevel(trim_offsets=False),
    "bos": tokenizers.processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)]),
    "eos": tokenizers.processors.TemplateProcessing(single=f"$A {STOP}", special_tokens=[(STOP, 2)]),
    "bos and eos": tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {STOP}", special_tokens=[(START, 1), (STOP, 2)]
    ),
    "the same before and after": tokenizers.processors.TemplateProcessing(
        single=f"{STOP} $A {STOP}", special_tokens=[(STOP, 2)]
    ),
}


def write_tokenizer(
    folder: Path,
    post_processor: str = "none",
    corpus: Sequence[str] = CORPUS,
    metaspace: bool = False,
    **config: Any,
) -> Path:
    """A byte-level BPE like SmolLM2-Instruct's, or one that writes spaces as Llama 2's does; `config` overrides what
    tokenizer_config.json holds."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if metaspace:
        bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END, START, STOP], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    if POST_PROCESSORS[post_processor] is not None:
        bpe.post_processor = POST_PROCESSORS[post_processor]
    bpe.enable_truncation(8)  # as a careless export leaves it: loading must undo it
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": STOP, "special": True}  # either spelling is found in releases
    usual = {"bos_token": START, "eos_token": eos, "pad_token": STOP, "chat_template": CHAT_TEMPLATES["smollm2"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(usual | config))
    return folder
