"""Talk with a model in the terminal, and switch between its adapters while doing so.

The answer appears as it is generated; Ctrl-C stops it. /help lists the commands. Piped input is read line by line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys

from minilora.cli import errors
from minilora.cli.answering import Loaded, add_flags, check_flags, load, pieces
from minilora.cli.parser import Parser
from minilora.data.prompts import encode_prompt, end_of_turn
from minilora.formats.library import BASE
from minilora.model.generation import Memory, room

HELP = """\
/adapter NAME   go on with this adapter; the conversation stays
/base           go on without an adapter
/list           the adapters, and which one answers
/clear          forget the conversation
/help           this list
/quit           leave, as do exit, quit and Ctrl-D; Ctrl-C stops an answer"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.chat", description=__doc__)
    add_flags(parser, max_tokens=256)
    return parser.read(argv)


class Chat:
    """One conversation, answered by the chosen adapter.

    Keys and values differ from model to model, so each model has a memory (KV cache) of its own, which is still there
    when the user comes back to an adapter. It only saves work: every answer is to the whole conversation.
    """

    def __init__(self, loaded: Loaded, system_prompt: str, max_tokens: int) -> None:
        self.loaded = loaded
        self.max_tokens = max_tokens
        self.stop_ids = loaded.stop_ids | end_of_turn(loaded.tokenizer)
        self.memories = {name: Memory(model) for name, model in loaded.models.items()}
        self.adapter = loaded.adapters[0]
        self.first = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self.first)

    def say(self, text: str) -> None:
        """Answer the user's message, word by word. The words of an interrupted answer stay in the conversation."""
        tokenizer, memory = self.loaded.tokenizer, self.memories[self.adapter]
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_prompt({"messages": asked}, tokenizer)
        try:
            left = room(memory.model, len(prompt))
        except ValueError as error:
            print(f"no room for an answer: {error}. /clear begins anew")
            return
        tokens = itertools.takewhile(
            lambda token: token not in self.stop_ids, memory.stream(prompt, self.loaded.choose)
        )
        limited = itertools.islice(tokens, min(self.max_tokens, left))
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces(limited, tokenizer):
                print(piece, end="", flush=True)
                answer += piece
        print()
        if len(memory.seen.tokens) + 1 == len(prompt) + left:  # the model has not read the last token of the answer
            print("(the context is full: /clear begins anew)")
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def obey(self, line: str) -> bool:
        """Carry out a command. Returns False if the chat is to end."""
        command, _, name = line.partition(" ")
        match command, name.strip():
            case "/quit", "":
                return False
            case "/help", "":
                print(HELP)
            case "/clear", "":
                self.messages = list(self.first)
            case "/list", "":
                for known in self.loaded.models:
                    print(f"{'*' if known == self.adapter else ' '} {known}")
            case "/base", "":
                self.adapter = BASE
            case "/adapter", name if name in self.loaded.models:
                self.adapter = name
            case "/adapter", name:
                print(f"no adapter {name!r}: there are {', '.join(self.loaded.models)}")
            case _:
                print(f"no command {line}: /help tells them")
        return True


def chat_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_flags(args)
    chat = Chat(load(args), args.system_prompt, args.max_tokens)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401 (input() can then be edited)
        print("/help tells the commands")
    while True:
        try:
            line = input(f"{chat.adapter}> " if terminal else "").strip()
            if line.lower() in ("exit", "quit"):
                break
            if line.startswith("/"):
                if not chat.obey(line):
                    break
            elif line:
                chat.say(line)
        except EOFError:
            break
        except ValueError as error:  # of this message: half a character, or what the chat template refuses
            print(f"not understood: {error}")
        except KeyboardInterrupt:
            print("\n/quit leaves")


def main(argv: list[str] | None = None) -> int:
    return errors.run(chat_command, argv)


if __name__ == "__main__":
    sys.exit(main())
