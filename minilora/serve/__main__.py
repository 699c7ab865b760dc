"""Serve a model and adapters on it by OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/models.

`model` in a request is "base" or an adapter's name. Requests that arrive together are answered in one batch, whose rows
may use different adapters. A browser finds a page at / on which the base and every adapter answer side by side.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path

from minilora.cli import errors
from minilora.cli.answering import add_loading_flags, load_models
from minilora.cli.flags import flags
from minilora.cli.parser import Parser
from minilora.formats.library import named_adapters
from minilora.model.generation import room

API_KEY = "MINILORA_API_KEY"
MOST_CHOICES = 16  # answers to one request


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.serve", description=__doc__)
    add_loading_flags(parser)

    def whole(names: list[str], default: int | None, help: str) -> None:
        parser.add_argument(*names, type=int, metavar="N", default=default, help=help)

    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: all (%(default)s)")
    whole(["--port"], 8000, "the port; 0: a free one (%(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must know (default: ${API_KEY}, or nothing)")
    whole(["--max-batch"], 8, "the most rows that run together (%(default)s)")
    whole(["--queue"], 64, "the most rows that wait; more are refused with 429 (%(default)s)")
    whole(flags("max_tokens"), 512, "the most new tokens of an answer (%(default)s)")
    whole(flags("max_length"), None, "the most tokens of prompt and answer (default: what the model sees)")
    return parser.read(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, if a value makes no sense."""
    for flag, value, least in (
        ("--max-batch", args.max_batch, 1),
        ("--queue", args.queue, 0),
        ("--max-tokens", args.max_tokens, 1),
        ("--max-length", args.max_length, 2),
        ("--port", args.port, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} must be at least {least}")
    if args.port > 65535:
        raise ValueError(f"--port {args.port} is above 65535")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound: a port that is taken is told before a model is loaded. OSError, naming the flag."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host {host} is no address of this machine: {error.strerror or error}") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    if os.name != "nt":  # on Windows this option would share the port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        reason = error.strerror or error
        raise OSError(
            f"--port {port}: cannot listen at {host} ({reason}): choose another, or 0 for a free one"
        ) from error
    return bound


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    try:
        import uvicorn

        from minilora.serve import api  # which needs Starlette
    except ModuleNotFoundError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'minilora[serve]'") from error
    from minilora.serve.scheduler import Scheduler
    from minilora.serve.served import Limits, Served

    bound = listen(args.host, args.port)
    models, tokenizer, name = load_models(args, named_adapters(args.adapter))
    most = max(room(model, 0) for model in models.values())
    if args.max_length and args.max_length > most:
        raise ValueError(f"--max-length {args.max_length} is more than the model sees: {most}")
    key = args.api_key if args.api_key is not None else os.environ.get(API_KEY, "")
    hosts = frozenset({"127.0.0.1", "localhost", "::1", args.host}) if is_local(args.host) else frozenset[str]()
    choices = min(MOST_CHOICES, args.max_batch + args.queue)
    limits = Limits(max_tokens=args.max_tokens, max_length=args.max_length or most, max_choices=choices)
    served = Served(Path(name).name, models, tokenizer, limits)
    app = api.application(served, Scheduler(args.max_batch, args.queue), api.Door(key, hosts))
    if not hosts and not key:
        print("remark: whoever reaches this machine can use the server: --api-key KEY", file=sys.stderr)
    port = bound.getsockname()[1]
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{name}: {', '.join(models)}; http://{shown}:{port}/ is a page, and /v1 the API. Ctrl-C ends", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
    uvicorn.Server(config).run([bound])


def main(argv: list[str] | None = None) -> int:
    return errors.run(serve_command, argv)


if __name__ == "__main__":
    sys.exit(main())
