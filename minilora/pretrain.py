"""`python -m minilora.pretrain`: make the small base model that is shipped in `weights/tinysmol`.

The tokenizer and the weights are learnt from nothing, on the text of the installed Python and on generated English, by
full-parameter training: the same forward, backward and loop that LoRA uses.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minilora.backend import to_device, to_host, use
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.files import write_json
from minilora.methods.full import full_model
from minilora.model.config import Config
from minilora.model.names import parameter_count
from minilora.text.batches import Rows, batches_of
from minilora.text.corpus import english_documents, python_documents
from minilora.text.examples import Example
from minilora.text.train_tokenizer import train_tokenizer
from minilora.training.loop import Plan, train
from minilora.training.optimizers import AdamW
from minilora.training.order import Order
from minilora.training.state import STATE_FILE, State
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
PYTHON_SHARE = 0.25  # of the tokens
HELD_OUT_EVERY = 50  # every 50th document of Python's text is never trained on
ENGLISH_TRAIN, ENGLISH_HELD_OUT = 0, 1  # seeds of the generated English


def python_split() -> tuple[list[str], list[str]]:
    """Documents of the installed Python: those to train on, and those held out."""
    documents = list(python_documents())
    held_out = documents[::HELD_OUT_EVERY]
    return [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY], held_out


def packed_rows(documents: Iterable[str], tokenizer: Tokenizer, tokens: int) -> Rows:
    """`tokens` tokens of documents, each closed by <|endoftext|>, end to end in rows of CONTEXT tokens.

    What does not fit goes on in the next row as a segment of its own, so that no row holds any padding.
    """
    rows: list[list[Example]] = [[]]
    room = CONTEXT
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


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, 1000)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield [*encoding.ids, 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/tinysmol"), help="folder of the model (%(default)s)")
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="folder of the training run")
    parser.add_argument("--tokens", type=float, default=10e6, help="how many tokens to train on (%(default)g)")
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {CONTEXT} tokens a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak, cosine to 0 (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--resume", action="store_true", help="go on where a run that was cut off last saved")
    args = parser.parse_args(argv)
    print(f"device: {use(args.device)}")

    args.out.mkdir(parents=True, exist_ok=True)
    args.run.mkdir(parents=True, exist_ok=True)
    python_train, python_held_out = python_split()
    sample = itertools.chain(python_train, itertools.islice(english_documents(ENGLISH_TRAIN), len(python_train)))
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(sample, TINYSMOL["vocab_size"], args.out)

    python_tokens = int(PYTHON_SHARE * args.tokens)
    python_rows = packed_rows(itertools.cycle(python_train), tokenizer, python_tokens)
    english_rows = packed_rows(english_documents(ENGLISH_TRAIN), tokenizer, int(args.tokens) - python_tokens)
    rows = [*python_rows, *english_rows]
    held_out = {
        "python": batches_of(packed_rows(python_held_out, tokenizer, 30_000), args.batch_size, 0),
        "english": batches_of(packed_rows(english_documents(ENGLISH_HELD_OUT), tokenizer, 30_000), args.batch_size, 0),
    }
    config = Config.from_dict(TINYSMOL)
    print(f"{parameter_count(config):,} parameters, {len(rows) * CONTEXT:,} tokens in {len(rows):,} rows")

    weights = random_weights(config, args.seed, std=TINYSMOL["initializer_range"])
    trainable = {name: to_device(array.copy()) for name, array in weights.items()}
    model = full_model(config, trainable)
    optimizer = AdamW(trainable, args.weight_decay, beta2=0.95)
    state = State(trainable, optimizer, Order(len(rows)), np.random.default_rng(args.seed))
    if args.resume and (args.run / STATE_FILE).is_file():
        state.load(args.run)
    steps = math.ceil(len(rows) / args.batch_size)
    plan = Plan(
        steps,
        args.batch_size,
        learning_rate=args.learning_rate,
        warmup=steps // 50,
        eval_every=max(1, steps // 20),
        save_every=max(1, steps // 20),
    )
    valid = held_out["python"][:4] + held_out["english"][:4]
    train(model, state, rows, valid, plan, args.run)

    write_checkpoint(args.out, TINYSMOL, {name: to_host(p) for name, p in trainable.items()}, dtype="bfloat16")
    losses = {name: mean_loss(model, batches) for name, batches in held_out.items()}
    figures = {f"{name}_perplexity": math.exp(loss) for name, loss in losses.items()}
    figures |= {"parameters": parameter_count(config), "tokens": state.tokens, "seconds": state.seconds}
    write_json(args.run / "summary.json", figures)
    print("\n".join(f"{name}: {value:,.2f}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
