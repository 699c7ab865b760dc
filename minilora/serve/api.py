"""HTTP: OpenAI's routes, the page at /, and /health."""

from __future__ import annotations

import contextlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from minilora.serve.delivery import Answers, EventStream, events, unless_gone
from minilora.serve.objects import Replies, model_object
from minilora.serve.problem import Problem
from minilora.serve.requests import Asked, read_chat, read_completion
from minilora.serve.scheduler import Scheduler
from minilora.serve.served import Served

PAGE = Path(__file__).with_name("page.html")
PAGE_MAY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Door:
    """Who may come in."""

    api_key: str = ""  # empty: anybody
    hosts: frozenset[str] = frozenset()  # the names by which the server may be called; empty: any

    def check(self, request: Request) -> None:
        """Raises Problem for a request that may not come in.

        A web page of a stranger could send requests to a server on this machine: by a name that it lets point here,
        which `hosts` refuses, or without asking, which browsers allow only for bodies that are not declared as JSON.
        """
        if self.hosts and host_name(request) not in self.hosts:
            raise Problem(403, f"this server is called {' or '.join(sorted(self.hosts))}", code="wrong_host")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Problem(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")
        if request.method == "POST" and not request.headers.get("content-type", "").startswith("application/json"):
            raise Problem(415, "the body must be declared as JSON: Content-Type: application/json")


def host_name(request: Request) -> str:
    """The name or address by which the client called this server, without the port."""
    return re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]")


async def read_body(request: Request, most: int) -> bytes:
    """The body, if it has at most this many bytes. Raises Problem."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Problem(413, f"the body has more than {most} bytes", code="request_too_large")
    return body


def application(served: Served, scheduler: Scheduler, door: Door) -> Starlette:
    """The ASGI application. Its start starts the scheduler's thread, and its end stops it."""

    def answering(read: Callable[[bytes, Served], Asked]) -> Handler:
        async def handle(request: Request) -> Any:
            door.check(request)
            body = await read_body(request, served.limits.max_body)
            asked = await run_in_threadpool(read, body, served)
            answers, replies = Answers(asked, served, scheduler), Replies(asked, served.tokenizer)
            if asked.stream:
                return EventStream(events(answers, replies), answers)
            pieces = await unless_gone(request, answers)
            return JSONResponse(replies.whole(pieces, answers.tokens)) if pieces else Response(status_code=499)

        return handle

    async def models(request: Request) -> Response:
        door.check(request)
        return JSONResponse({"object": "list", "data": [model_object(served, name) for name in served.models]})

    async def one_model(request: Request) -> Response:
        door.check(request)
        served.check_name(request.path_params["name"])
        return JSONResponse(model_object(served, request.path_params["name"]))

    async def health(request: Request) -> Response:
        counts = {"running": scheduler.running, "waiting": len(scheduler.waiting), "tokens": scheduler.tokens}
        return JSONResponse(
            {"status": "ok", **counts, "max_batch": scheduler.most_rows, "queue": scheduler.most_waiting}
        )

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"Content-Security-Policy": PAGE_MAY})

    async def told(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, Problem)
        return JSONResponse(problem.as_object(), problem.status)

    async def told_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(Problem(error.status_code, what).as_object(), error.status_code, error.headers)

    async def told_failure(request: Request, error: Exception) -> Response:
        return JSONResponse(Problem(500, "an error in this server: its log has more").as_object(), 500)

    async def nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client has gone while it sent its body

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.stop()

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", answering(read_chat), methods=["POST"]),
        Route("/v1/completions", answering(read_completion), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        Problem: told,
        HTTPException: told_http,
        ClientDisconnect: nobody,
        Exception: told_failure,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
