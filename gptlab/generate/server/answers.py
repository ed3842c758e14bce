"""Answers in OpenAI's forms: whole, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gptlab.generate.server.errors import Refused
from gptlab.generate.server.fields import Request
from gptlab.generate.server.scheduler import Event, Reply
from gptlab.generate.server.served import Served

LEAST_LOGPROB = -9999.0  # what OpenAI writes for less, since JSON has no infinity
Finished = Callable[[str], None]


class Answer(Response):
    """Answers a request as its tokens are made. A client that leaves is noticed at once, and its place is free."""

    def __init__(self, served: Served, asked: Request, reply: Reply, prompts: Sequence[int], finished: Finished | None = None) -> None:
        """`prompts`: the tokens of each. `finished` is given the first text when it is whole."""
        super().__init__()
        self.served, self.asked, self.reply, self.prompts, self.finished = served, asked, reply, prompts, finished
        self.chat = bool(asked.messages)
        self.made = 0
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": ("chat.completion.chunk" if asked.stream else "chat.completion") if self.chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model or served.name,
        }
        self._first = ""
        self._places: dict[int, int] = {}  # characters of each text that were told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._stream(send) if self.asked.stream else self._whole(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.reply.cancel()
            for task in (leaving, writing):
                if not task.done():
                    task.cancel()
            for task in (leaving, writing):
                with contextlib.suppress(asyncio.CancelledError, OSError):  # OSError: it left while it was written to
                    await task

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})

        async def write(*lines: Mapping[str, Any] | str) -> None:
            body = "".join(f"data: {line if isinstance(line, str) else json.dumps(line, separators=(',', ':'))}\n\n" for line in lines)
            await send({"type": "http.response.body", "body": body.encode(), "more_body": True})

        if self.chat:
            roles = [self._choice(i, {"role": "assistant", "content": ""}, None, None) for i in range(self.asked.n)]
            await write(self._chunk(roles))
        try:
            async for events in self.reply.events():
                by_row: dict[int, list[Event]] = {}
                for event in events:
                    by_row.setdefault(event.row, []).append(event)
                self._count(events)
                chunks = [self._of_row(row, mine) for row, mine in by_row.items()]
                await write(*(self._chunk([choice]) for choice in chunks))
        except Refused as error:
            await write(error.body())
        else:
            if self.asked.usage:
                await write(self.head | {"choices": [], "usage": self._usage()})
            await write("[DONE]")
            self._tell()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        by_row: list[list[Event]] = [[] for _ in range(len(self.prompts) * self.asked.n)]
        try:
            async for events in self.reply.events():
                self._count(events)
                for event in events:
                    by_row[event.row].append(event)
        except Refused as error:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        choices = [self._of_row(row, mine) for row, mine in enumerate(by_row)]
        self._tell()
        await JSONResponse(self.head | {"choices": choices, "usage": self._usage()})(scope, receive, send)

    def _tell(self) -> None:
        if self.finished is not None:
            self.finished(self._first)

    def _count(self, events: Sequence[Event]) -> None:
        self.made += len(events)
        if self.finished is not None:
            self._first += "".join(event.text for event in events if event.row == 0)

    def _of_row(self, row: int, events: Sequence[Event]) -> dict[str, Any]:
        text, finish = "".join(event.text for event in events), events[-1].finish
        told = None
        if self.asked.top is not None:
            content = [self._told(event) for event in events if event.finish != "stop" or event.text]
            told = {"content": content} if self.chat else _legacy(content, self._places.get(row, 0)) | {"content": content}
            self._places[row] = self._places.get(row, 0) + len(text)
        if not self.chat:
            return {"index": row, "text": text, "logprobs": told, "finish_reason": finish}
        said = {"content": text} if self.asked.stream else {"role": "assistant", "content": text}
        return self._choice(row, said, told, finish)

    def _choice(self, row: int, said: Mapping[str, Any], told: Any, finish: str | None) -> dict[str, Any]:
        return {"index": row, "delta" if self.asked.stream else "message": said, "logprobs": told, "finish_reason": finish}

    def _chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.head | {"choices": choices} | ({"usage": None} if self.asked.usage else {})

    def _told(self, event: Event) -> dict[str, Any]:
        """A token with its log-probability. Beyond OpenAI's fields: its `id`, and the `text` it adds, which is whole characters."""
        top = [self._likely(token, logprob) for token, logprob in event.made.likeliest]
        return self._likely(event.made.token, event.made.logprob or 0.0) | {"text": event.text, "top_logprobs": top}

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        text, whole = self.served.told(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": whole, "id": token}

    def _usage(self) -> dict[str, int]:
        prompt = sum(self.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self.made, "total_tokens": prompt + self.made}


def _legacy(content: Sequence[Mapping[str, Any]], place: int) -> dict[str, Any]:
    """Log-probabilities as /v1/completions has them. `place`: of the first token in its text."""
    offsets = []
    for one in content:
        offsets.append(place)
        place += len(one["text"])
    return {
        "tokens": [one["token"] for one in content],
        "token_logprobs": [one["logprob"] for one in content],
        "top_logprobs": [{likely["token"]: likely["logprob"] for likely in one["top_logprobs"]} for one in content],
        "text_offset": offsets,
    }


async def _left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
