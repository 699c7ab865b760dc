"""Chat templates are programs from the internet: a process that renders them, and that can be ended.

Jinja's sandbox keeps a template from files and from Python, but not from loops in loops, doubled texts or endless
recursion. So templates are rendered in one child process, started for the first of them, which may take so many seconds
for a conversation and, on Linux, so much memory. Elsewhere only the time is bounded. The child knows this file and
Jinja, and neither NumPy nor any model.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any

SECONDS, BYTES = 10, 2**30  # for one conversation
START = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"


def rendered(template: str, now: datetime, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of variables, which JSON can hold. ValueError, with the reason, if it fails."""
    return _process.render(template, now, variables)


class _Process:
    """The child process, started when it is needed, and again if it had to be ended."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = 0  # the process that has started it: after a fork, another one starts its own
        self.lock = threading.Lock()

    def render(self, template: str, now: datetime, variables: Mapping[str, Any]) -> str:
        try:
            asked = json.dumps([template, now.isoformat(), variables]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"what it is given is no JSON ({error})") from error
        with self.lock:
            answer = self._ask(asked)
        if not answer.endswith(b"\n"):
            raise ValueError(f"it takes more than {SECONDS} seconds, or more than {BYTES >> 20} MB of memory")
        text, reason = json.loads(answer)
        if reason:
            raise ValueError(reason)
        return str(text)

    def _ask(self, line: bytes) -> bytes:
        """The line that the child answers; nothing if it has died or had to be ended."""
        if self.child is None or self.owner != os.getpid() or self.child.poll() is not None:
            self._start()
        child = self.child
        assert child and child.stdin and child.stdout
        timer = threading.Timer(SECONDS, child.kill)
        timer.start()
        answer = b""
        try:
            with suppress(OSError):
                child.stdin.write(line + b"\n")
                child.stdin.flush()
                answer = child.stdout.readline()
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):  # also when Ctrl-C comes in between: the next line would be an old answer
                self.close()
        return answer

    def _start(self) -> None:
        code = START.format(path=sys.path, file=__file__)
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,  # Ctrl-C in the terminal ends an answer, and not this process
        )
        self.owner = os.getpid()

    def close(self) -> None:
        """End the child, if this process has one."""
        child, self.child = self.child, None
        if child is not None and self.owner == os.getpid():
            child.kill()
            with suppress(OSError):
                child.communicate()


_process = _Process()
atexit.register(_process.close)


# --- In the child ---


def serve() -> None:
    """Answer each line [template, time, variables] with a line [text, reason of failure], until the input ends."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit, and macOS none that holds
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    for line in sys.stdin.buffer:
        template, now, variables = json.loads(line)
        try:
            answer = [compiled(template, now).render(variables), ""]
        except MemoryError:
            answer = ["", f"it takes more than {BYTES >> 20} MB of memory"]
        except Exception as error:  # whatever the template's own operations raise
            answer = ["", str(error) or type(error).__name__]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


@cache
def compiled(template: str, now: str) -> Any:
    """The template, ready to render.

    Beside Jinja's own there are `tojson`, `raise_exception`, `strftime_now`, `break` and `continue`, and the tag
    `generation`. `now` is what a template is told that asks for the time. Raises jinja2.TemplateError.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's words in some templates: render them."""

        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        """JSON as it is; Jinja's own filter would escape < > & for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.fromisoformat(now).strftime
    return environment.from_string(template)


if __name__ == "__main__":
    serve()
