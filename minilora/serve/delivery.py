"""From the scheduler to the client: the pieces of the answers to one request, streamed or whole.

A request is a coroutine with a queue, into which the scheduler's thread puts the pieces. If the client goes away, its
rows are let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minilora.backend import HostArray
from minilora.serve.answer import Answer, Piece
from minilora.serve.objects import Object, Replies
from minilora.serve.problem import Problem
from minilora.serve.requests import Asked, Choice
from minilora.serve.scheduler import QueueFull, Row, Scheduler
from minilora.serve.served import Served


class Answers:
    """The answers to one request, as they come."""

    def __init__(self, asked: Asked, served: Served, scheduler: Scheduler) -> None:
        """Raises Problem if the queue is full."""
        self.scheduler = scheduler
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.texts = [Answer(served.tokenizer, choice.ends, asked.best) for choice in asked.choices]
        self.rows = [self._row(i, choice, asked) for i, choice in enumerate(asked.choices)]
        try:
            scheduler.submit(self.rows)
        except QueueFull:
            message = f"{scheduler.most_waiting} answers wait already: try again later"
            raise Problem(429, message, code="rate_limit_exceeded") from None

    def _row(self, choice: int, given: Choice, asked: Asked) -> Row:
        def tell(what: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has been forced to end
                self.loop.call_soon_threadsafe(self.pieces.put_nowait, (choice, what))

        def hear(token: int, logits: HostArray) -> bool:
            piece = self.texts[choice].add(token, logits)
            if piece.text or piece.chances or piece.finish_reason:
                tell(piece)
            return not piece.finish_reason

        return Row(asked.model, given.prompt, given.choose, hear, tell)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The number of a choice and its next piece, until all have ended. Raises Problem if one fails."""
        left = len(self.rows)
        while left:
            choice, piece = await self.pieces.get()
            if isinstance(piece, Exception):
                raise Problem(500, str(piece) or type(piece).__name__, code="generation_failed") from piece
            left -= bool(piece.finish_reason)
            yield choice, piece

    async def whole(self) -> list[Piece]:
        """Each answer in one piece."""
        parts: list[list[Piece]] = [[] for _ in self.rows]
        async for choice, piece in self:
            parts[choice].append(piece)
        return [
            Piece("".join(p.text for p in part), [c for p in part for c in p.chances], part[-1].finish_reason)
            for part in parts
        ]

    @property
    def tokens(self) -> int:
        """How many have been generated, those that end an answer aside."""
        return sum(text.tokens for text in self.texts)

    def leave(self) -> None:
        """Nobody waits any more."""
        self.scheduler.leave(self.rows)


class EventStream:
    """A response of server-sent events, which frees its rows however it ends."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        self.response = StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.answers.leave()


async def events(answers: Answers, replies: Replies) -> AsyncIterator[bytes]:
    """`data: {…}` for each piece, and `data: [DONE]` at the end. A failure is told as an object with `error`."""
    try:
        if replies.asked.chat:
            for choice in range(len(answers.rows)):
                yield event(replies.first(choice))
        async for choice, piece in answers:
            yield event(replies.chunk(choice, piece))
        if replies.asked.include_usage:
            yield event(replies.usage(answers.tokens))
        yield b"data: [DONE]\n\n"
    except Problem as problem:
        yield event(problem.as_object())


def event(value: Object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def unless_gone(request: Request, answers: Answers) -> list[Piece] | None:
    """Each answer in one piece; None if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(answers.whole()), asyncio.create_task(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, watch):
            task.cancel()
        answers.leave()
