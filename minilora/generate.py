"""Continue prompts with a model, and perhaps adapters. The answer to a single prompt appears as it is generated.

Several prompts are answered in batches, with one JSON object per line. Each may have an adapter of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minilora.adapters.mixed import mixed, shares_batches
from minilora.cli import errors
from minilora.cli.answering import Loaded, add_flags, check_flags, load, pieces
from minilora.cli.flags import flags
from minilora.cli.parser import Parser
from minilora.data.prompts import PromptRow, as_messages, conversation, encode_prompt, end_of_turn, read_prompts
from minilora.data.tokenizer import Tokenizer
from minilora.formats.files import write_text
from minilora.formats.library import BASE
from minilora.model.generation import complete, room, stream


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.generate", description=__doc__)
    add_flags(parser, max_tokens=128)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the text to continue; may be given several times; - reads it from standard input (default)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='more prompts, one JSON object per line: {"prompt": "…"} or {"messages": […]}, and perhaps '
        '"adapter": "NAME"; a prompt without one is answered by every --adapter',
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put each prompt into the chat template as a user's message (default: if adapters learnt from messages)",
    )
    parser.add_argument(*flags("batch_size"), metavar="N", type=int, default=8, help="prompts in a batch (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, even for a single prompt")
    parser.add_argument(*flags("out"), type=Path, metavar="FILE", help="write these lines to a file")
    return parser.read(argv)


class Request(NamedTuple):
    """A prompt and the adapter that is to answer it."""

    row: PromptRow
    adapter: str
    ids: list[int]
    limit: int  # the most new tokens


def generate_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_flags(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    if args.out:
        check_out(args.out, args.prompts)
    loaded = load(args)
    rows = given_prompts(args, in_template(args.chat, loaded))
    requests = [
        make_request(row, adapter, loaded, args.max_tokens)
        for row in rows
        for adapter in ([row["adapter"]] if "adapter" in row else loaded.adapters)
    ]
    if not all(isinstance(conversation(row), str) for row in rows):
        loaded = loaded._replace(stop_ids=loaded.stop_ids | end_of_turn(loaded.tokenizer))
    if len(requests) == 1 and not args.json and not args.out:
        for piece in words(requests[0], loaded):
            print(piece, end="", flush=True)
        print()
        return
    lines = []
    for line in answer_lines(requests, loaded, args.batch_size):
        lines.append(line)
        if not args.out:
            print(line, flush=True)
    if args.out:
        write_text(args.out, "".join(f"{line}\n" for line in lines))


def in_template(asked: bool | None, loaded: Loaded) -> bool:
    """Whether texts are to become messages: as asked, or else as the adapters' training rows were, which is told."""
    if asked is None and loaded.learnt_to_chat:
        if not loaded.tokenizer.templates:
            print("the adapter learnt from messages, but this model has no chat template to show them", file=sys.stderr)
            return False
        print("prompts go into the chat template, as the adapter's training rows did: --no-chat", file=sys.stderr)
        return True
    return bool(asked)


def check_out(out: Path, prompts: Path | None) -> None:
    """ValueError if the answers would replace a file that is not of such answers, or the prompts themselves."""
    if prompts and out.exists() and prompts.exists() and out.samefile(prompts):
        raise ValueError(f"--out {out} is the file of --prompts, and would be replaced: choose another name")
    if out.exists() and not (out.is_file() and holds_answers(out)):
        raise ValueError(f"--out {out} exists, and is not a file that generate has written: choose another name")


def holds_answers(path: Path) -> bool:
    """Whether a file is empty, or begins with a line of ours."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        return not line or {"adapter", "generated_text", "finish_reason"} <= json.loads(line).keys()
    except (ValueError, AttributeError):  # no JSON, or no object
        return False


def given_prompts(args: argparse.Namespace, chat: bool) -> list[PromptRow]:
    """All prompts in order. With `chat`, texts become messages."""
    texts = args.prompt or ([] if args.prompts else ["-"])
    rows: list[PromptRow] = [{"prompt": sys.stdin.read() if text == "-" else text} for text in texts]
    rows += read_prompts(args.prompts) if args.prompts else []
    if chat:
        for row in rows:
            if isinstance(conversation(row), str):
                row["prompt"] = as_messages(row["prompt"], args.system_prompt)
    elif args.system_prompt:
        raise ValueError("--system-prompt goes with --chat")
    return rows


def make_request(row: PromptRow, adapter: str, loaded: Loaded, max_tokens: int) -> Request:
    if adapter not in loaded.models:
        raise ValueError(f"a prompt asks for the adapter {adapter!r}: there are {', '.join(loaded.models)}")
    ids = encode_prompt(row, loaded.tokenizer)
    if not ids:
        raise ValueError("the prompt is empty: give some text with --prompt")
    return Request(row, adapter, ids, min(max_tokens, room(loaded.models[adapter], len(ids))))


def words(request: Request, loaded: Loaded) -> Iterator[str]:
    """The answer to one prompt, piece by piece."""
    tokens = (int(row[0]) for row in stream(loaded.models[request.adapter], [request.ids], loaded.choose))
    answer = itertools.takewhile(lambda token: token not in loaded.stop_ids, tokens)
    return pieces(itertools.islice(answer, request.limit), loaded.tokenizer)


def answer_lines(requests: Sequence[Request], loaded: Loaded, batch_size: int) -> Iterator[str]:
    """A line of JSON for each request, in order, as batches are finished.

    Rows of a batch may use different adapters. Only models that cannot share a batch (`shares_batches`) are separated.
    """

    def batch_key(request: Request) -> str:
        shares = shares_batches(loaded.models[request.adapter], loaded.models[BASE])
        return BASE if shares else request.adapter

    for _, group in itertools.groupby(requests, batch_key):
        group_requests = list(group)
        for start in range(0, len(group_requests), batch_size):
            batch = group_requests[start : start + batch_size]
            model = mixed([loaded.models[request.adapter] for request in batch])
            limit = max(request.limit for request in batch)
            completions = complete(model, [request.ids for request in batch], limit, loaded.stop_ids, loaded.choose)
            for request, tokens in zip(batch, completions, strict=True):
                yield as_line(request, tokens[: request.limit], loaded.tokenizer)


def as_line(request: Request, tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The row and its answer as JSON. `finish_reason` is "stop" or "length", as in the APIs of model servers."""
    answer = {
        "adapter": request.adapter,
        "generated_text": tokenizer.decode(tokens),
        "finish_reason": "stop" if len(tokens) < request.limit else "length",
    }
    return json.dumps(request.row | answer, ensure_ascii=False, allow_nan=False)


def main(argv: list[str] | None = None) -> int:
    return errors.run(generate_command, argv)


if __name__ == "__main__":
    sys.exit(main())
