"""`python -m minilora.pretrain`: make the small base model that is shipped in `weights/tinysmol`.

The tokenizer and the weights are learnt from nothing, on the text of the installed Python and on generated English, by
full-parameter training: the same forward, backward and loop that LoRA uses.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minilora.backend import to_device, to_host, use
from minilora.cli import errors
from minilora.cli.parser import Parser
from minilora.data.batches import Rows, batches_of
from minilora.data.store import Example
from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.files import write_json
from minilora.formats.whole import check_new
from minilora.methods.full import full_model
from minilora.model.config import Config
from minilora.model.names import parameter_count
from minilora.pretrain.corpus import english_documents, python_documents
from minilora.runs.folder import SUMMARY_FILE, is_free, only_run, train_in
from minilora.runs.state_file import STATE_FILE, load_state
from minilora.training.flat import Flat
from minilora.training.loop import Plan
from minilora.training.optimizers import AdamW
from minilora.training.order import Order
from minilora.training.state import State
from minilora.training.step import mean_loss

CONTEXT = 256
TINYSMOL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.03,
    "intermediate_size": 640,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}
PYTHON_SHARE = 0.15  # of the text's tokens; the rest is generated English
STAGES = (  # name, share of all tokens, share of copying in them, share of the learning rate, schedule
    ("text", 0.18, 0.0, 1.0, "constant"),
    ("copying", 0.04, 1.0, 0.5, "constant"),
    ("text-and-copying", 0.78, 0.1, 0.7, "cosine"),
)
SAID_AGAIN = 64  # tokens of one exercise in copying
HELD_OUT_EVERY = 50  # every 50th document of Python's text is never trained on
ENGLISH_TRAIN, ENGLISH_HELD_OUT = 0, 1  # seeds of the generated English


def python_split() -> tuple[list[str], list[str]]:
    """Documents of the installed Python: those to train on, and those held out."""
    documents = list(python_documents())
    held_out = documents[::HELD_OUT_EVERY]
    return [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY], held_out


def packed_rows(documents: Iterable[str], tokenizer: Tokenizer, tokens: int) -> Rows:
    """`tokens` tokens of documents, each closed by <|endoftext|>, end to end in rows of CONTEXT tokens.

    The part of a document that does not fit goes on in the next row as a segment of its own, so no row has padding.
    """
    rows: list[list[Example]] = [[]]
    room = CONTEXT
    if tokens < CONTEXT:
        return []
    for ids in _encoded(documents, tokenizer):
        while len(ids):
            part, ids = ids[:room], ids[room:]
            rows[-1].append(Example(part, [True] * len(part)))
            room -= len(part)
            if room == 0:
                if len(rows) * CONTEXT >= tokens:
                    return rows
                rows.append([])
                room = CONTEXT
    return rows[:-1]


def stage_rows(
    tokens: int,
    copying: float,
    texts: tuple[Iterator[str], Iterator[str]],
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> Rows:
    """The rows of one stage, a share of them exercises in copying. Both streams of text go on from stage to stage."""
    python, english = texts
    copying_tokens = int(copying * tokens)
    python_tokens = int(PYTHON_SHARE * (tokens - copying_tokens))
    return [
        *packed_rows(python, tokenizer, python_tokens),
        *packed_rows(english, tokenizer, tokens - copying_tokens - python_tokens),
        *copying_rows(copying_tokens, rng),
    ]


def copying_rows(tokens: int, rng: np.random.Generator) -> Rows:
    """Exercises in copying: random tokens, once and then repeated. Only the repetitions are trained.

    From text alone a model this small takes millions of tokens to discover that it can look up what followed the last
    time (an "induction head": Olsson et al., 2022, arXiv:2209.11895). Here nothing else helps, and once text has given
    its tokens distinct embeddings it takes minutes.
    """

    def exercise() -> Example:
        period = int(rng.integers(4, SAID_AGAIN // 2))
        said = rng.integers(0, TINYSMOL["vocab_size"], period)
        return Example(np.resize(said, SAID_AGAIN).tolist(), [i >= period for i in range(SAID_AGAIN)])

    return [[exercise() for _ in range(CONTEXT // SAID_AGAIN)] for _ in range(tokens // CONTEXT)]


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, 1000)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield [*encoding.ids, 0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.pretrain", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pretrain/tinysmol"), help="the folder of the model (%(default)s)"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="the folder of the training run")
    parser.add_argument("--tokens", type=float, default=23.7e6, help="the number of tokens to train on (%(default)g)")
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {CONTEXT} tokens a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the peak learning rate (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="weight decay of matrices (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the weights and the order (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--resume", action="store_true", help="resume a run that was cut off, from its last saved state"
    )
    return parser.read(argv)


def pretrain_command(argv: list[str] | None = None) -> None:
    """Parse, check the folders, and make the model."""
    args = parse(argv)
    if not args.resume:
        check_new(args.out)
        for name, *_ in STAGES:
            if not is_free(args.run / name):
                raise ValueError(f"--run {args.run} holds a run or other files: choose another, or give --resume")
    with only_run(args.run):
        pretrain(args)


def pretrain(args: argparse.Namespace) -> None:
    """Make tokenizer, rows and weights; train on text, copying and both; write checkpoint and held-out perplexity."""
    print(f"device: {use(args.device)}")
    args.out.mkdir(parents=True, exist_ok=True)
    config = Config.from_dict(TINYSMOL)
    python_train, python_held_out = python_split()
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        english = itertools.islice(english_documents(ENGLISH_TRAIN), len(python_train))
        tokenizer = train_tokenizer(itertools.chain(python_train, english), config.vocab_size, args.out)

    rng = np.random.default_rng(args.seed)
    texts = itertools.cycle(python_train), english_documents(ENGLISH_TRAIN)
    rows = {
        name: stage_rows(int(share * args.tokens), copying, texts, tokenizer, rng)
        for name, share, copying, _, _ in STAGES
    }
    held_out = {
        "python": batches_of(packed_rows(python_held_out, tokenizer, 30_000), args.batch_size, 0),
        "english": batches_of(packed_rows(english_documents(ENGLISH_HELD_OUT), tokenizer, 30_000), args.batch_size, 0),
        "copying": batches_of(copying_rows(10_000, rng), args.batch_size, 0),
    }
    print(f"{parameter_count(config):,} parameters, {args.tokens:,.0f} tokens")

    weights = random_weights(config, args.seed, std=TINYSMOL["initializer_range"])
    trainable = {name: to_device(array.copy()) for name, array in weights.items()}
    model = full_model(config, trainable)
    seconds = 0.0
    for name, _, copying, rate, schedule in STAGES:
        folder = args.run / name
        folder.mkdir(parents=True, exist_ok=True)
        optimizer = AdamW(trainable, args.weight_decay, beta2=0.95)
        state = State(Flat(trainable, {}), optimizer, Order(len(rows[name])), np.random.default_rng(args.seed))
        if args.resume and (folder / STATE_FILE).is_file():
            load_state(state, folder)
        steps = math.ceil(len(rows[name]) / args.batch_size)
        plan = Plan(
            steps,
            args.batch_size,
            learning_rate=rate * args.learning_rate,
            schedule=schedule,
            warmup=min(100, steps // 10),
            eval_every=max(1, steps // 20),
            save_every=max(1, steps // 20),
        )
        valid = held_out["copying"] if copying == 1 else held_out["python"][:3] + held_out["english"][:6]
        train_in(folder, model, state, rows[name], valid, plan)
        seconds += state.seconds

    write_checkpoint(args.out, TINYSMOL, {name: to_host(p) for name, p in trainable.items()}, dtype="bfloat16")
    figures = {f"{name}_perplexity": math.exp(mean_loss(model, batches)) for name, batches in held_out.items()}
    figures |= {"parameters": parameter_count(config), "tokens": args.tokens, "seconds": seconds}
    write_json(args.run / SUMMARY_FILE, figures)
    for name, value in figures.items():
        print(f"{name:20} {value:,.2f}")


def main(argv: list[str] | None = None) -> int:
    return errors.run(pretrain_command, argv)


if __name__ == "__main__":
    sys.exit(main())
