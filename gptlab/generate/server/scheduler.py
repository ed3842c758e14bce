"""Continuous batching: one thread a model makes the texts of all requests side by side, and each comes and goes when it will."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import torch

from gptlab.data.tokenizer import Tokenizer
from gptlab.generate.engine import Engine, Made, Reading
from gptlab.generate.sampling import Sampling
from gptlab.generate.server.errors import Refused
from gptlab.generate.text import TextStream
from gptlab.model.transformer import Transformer

READ_AT_ONCE = 256  # tokens of new prompts between two steps, so that running texts do not wait long for those that join
MOST_ROWS = 32
SMALL = 20_000_000  # parameters, below which one core is faster than two that wait for each other at every operation
CACHE_BYTES = 2 << 30  # that the rows' keys and values may take, unless the number of rows is given
GONE = "the server is closing; ask again when it is back"


@dataclass(frozen=True)
class Event:
    """A token of text `row` of a request, with what it adds to that text for certain."""

    row: int
    text: str
    made: Made
    finish: str | None = None  # "stop" or "length", with the last event of a row


@dataclass(frozen=True)
class Ask:
    """One prompt and how each of its texts is drawn. `ends`: tokens that end a text; `top`: as a row's of the engine."""

    prompt: tuple[int, ...]
    settings: tuple[Sampling, ...]
    ends: frozenset[int]
    top: int | None = None


class Reply:
    """What a request's listener is told, in the event loop that it was submitted from: `async for events in reply.events()`."""

    def __init__(self, texts: int) -> None:
        self.cancelled = False
        self.loop = asyncio.get_running_loop()
        self._left = texts  # that have not ended
        self._arrived: list[Event] = []
        self._failure: Refused | None = None
        self._ready = asyncio.Event()

    def cancel(self) -> None:
        """Nobody listens any more: its rows are free at the next step."""
        self.cancelled = True

    async def events(self) -> AsyncIterator[list[Event]]:
        """What happened since it was last asked, until every text has ended. Raises Refused where the model or the server fails."""
        while self._left:
            await self._ready.wait()
            self._ready.clear()
            arrived, self._arrived = self._arrived, []
            self._left -= sum(event.finish is not None for event in arrived)
            if arrived:
                yield arrived
            if self._failure is not None:
                raise self._failure

    def deliver(self, events: list[Event], failure: Refused | None = None) -> None:
        self._arrived += events
        self._failure = self._failure or failure
        self._ready.set()


class _Job:
    """One prompt of a request, whose texts are numbered from `first` on."""

    def __init__(self, ask: Ask, first: int, reply: Reply, tokenizer: Tokenizer) -> None:
        self.ask, self.first, self.reply = ask, first, reply
        self.streams = [TextStream(tokenizer, own.stop) for own in ask.settings]


class Scheduler:
    """Makes texts with one model, in a thread of its own.

    Requests wait in a queue of bounded length, and join in the order they came, as long as there are fewer than `rows` texts: at most
    `READ_AT_ONCE` tokens of new prompts are read between two steps of the running texts, of a longer prompt a piece at a time.
    `threads`: cores of a step.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, rows: int | None = None, queue: int = 64, threads: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rows = rows or fitting_rows(model)
        self.queue = queue
        self.threads = threads or fitting_threads(model)
        self._engine = Engine(model)
        self._waiting: deque[_Job] = deque()
        self._of: dict[int, tuple[_Job, int]] = {}  # which text of which request a row is
        self._reading: tuple[_Job, Reading] | None = None  # the prompt that is being read
        self._numbers = 0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gptlab-scheduler", daemon=True)

    def start(self) -> Scheduler:
        self.model.eval()
        self._thread.start()
        return self

    def close(self) -> None:
        """End the thread; requests that are not done fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Texts that are being made."""
        return len(self._of)

    def submit(self, *asks: Ask) -> Reply:
        """Queue one request of several prompts, all or none, from the event loop that will read it; its texts are numbered prompt by
        prompt. Raises Refused 503 where the queue is full, or 400 for more texts than are ever made at once."""
        for ask in asks:
            if len(ask.settings) > self.rows:
                raise Refused(400, f"n: this server makes at most {self.rows} texts at once", param="n")
        reply, jobs, first = Reply(sum(len(ask.settings) for ask in asks)), [], 0
        for ask in asks:
            jobs.append(_Job(ask, first, reply, self.tokenizer))
            first += len(ask.settings)
        with self._wake:
            if self._closing:
                raise Refused(503, GONE)
            self._waiting = deque(job for job in self._waiting if not job.reply.cancelled)
            if len(self._waiting) + len(jobs) > self.queue:
                raise Refused(503, f"{len(self._waiting)} requests wait already; ask again in a moment", code="queue_full")
            self._waiting.extend(jobs)
            self._wake.notify()
        return reply

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # of this thread
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._waiting or self._reading or self._engine.rows)
                if self._closing:
                    break
            try:
                self._admit()
                if self._engine.rows:
                    self._step()
            except Exception:  # a model that is not finite, or memory that is used up: its requests fail, the server goes on
                print("gptlab serve: a step failed\n" + traceback.format_exc(), file=sys.stderr)
                self._fail(Refused(500, "the model failed to make a text; the server's terminal says why", code="model_failed"))
        self._fail(Refused(503, GONE), waiting=True)

    def _admit(self) -> None:
        """Read the prompts of those that wait longest, as far as there is room; of a long one a piece."""
        left = READ_AT_ONCE
        while left > 0:
            if self._reading is None:
                self._reading = self._next(whole=None if left == READ_AT_ONCE else left)
            if self._reading is None:
                return
            job, reading = self._reading
            if job.reply.cancelled:
                self._reading = None
                continue
            before = reading.left
            reading.go_on(left)
            left -= before - reading.left
            if reading.left:
                return
            numbers = range(self._numbers, self._numbers + len(job.ask.settings))
            self._numbers += len(numbers)
            self._of |= {number: (job, i) for i, number in enumerate(numbers)}
            self._reading = None
            self._engine.take(job.ask.prompt, reading, job.ask.settings, numbers, top=job.ask.top)

    def _next(self, *, whole: int | None) -> tuple[_Job, Reading] | None:
        """The job that waits longest, if there is room for its texts; with `whole` only if its prompt has no more tokens than that."""
        with self._wake:
            while self._waiting and self._waiting[0].reply.cancelled:
                self._waiting.popleft()
            if not self._waiting or len(self._engine.rows) + len(self._waiting[0].ask.settings) > self.rows:
                return None
            if whole is not None and min(len(self._waiting[0].ask.prompt), self._engine.context) > whole:
                return None
            job = self._waiting.popleft()
        return job, Reading(self.model, job.ask.prompt)

    def _step(self) -> None:
        arrived: dict[Reply, list[Event]] = {}
        for row, made in zip(list(self._engine.rows), self._engine.step(), strict=True):
            job, i = self._of[made.row]
            if job.reply.cancelled:
                row.done = True
            else:
                event = _event(job, i, made, row.done)
                arrived.setdefault(job.reply, []).append(event)
                row.done = event.finish is not None
            if row.done:
                del self._of[made.row]
        _tell([(reply, events, None) for reply, events in arrived.items()])
        self._engine.advance()

    def _fail(self, why: Refused, *, waiting: bool = False) -> None:
        jobs = {job for job, _ in self._of.values()}
        if waiting:
            with self._wake:
                jobs |= set(self._waiting)
                self._waiting.clear()
        if self._reading is not None:
            jobs.add(self._reading[0])
            self._reading = None
        self._of.clear()
        self._engine = Engine(self.model)
        _tell([(reply, [], why) for reply in {job.reply for job in jobs}])


def _event(job: _Job, i: int, made: Made, full: bool) -> Event:
    stream, number = job.streams[i], job.first + i
    made = replace(made, row=number)
    if made.token in job.ask.ends:
        return Event(number, stream.finish(), made, "stop")
    text = stream.feed(made.token)
    if stream.stopped:
        return Event(number, text, made, "stop")
    if full:
        text += stream.finish()  # which may turn out to hold a stop string
        return Event(number, text, made, "stop" if stream.stopped else "length")
    return Event(number, text, made)


Told = tuple[Reply, list[Event], Refused | None]


def _tell(told: Sequence[Told]) -> None:
    """Hand events over, with one call into each event loop whatever the number of requests."""
    loops: dict[asyncio.AbstractEventLoop, list[Told]] = {}
    for one in told:
        loops.setdefault(one[0].loop, []).append(one)
    for loop, mine in loops.items():
        with contextlib.suppress(RuntimeError):  # closed: nobody listens there any more
            loop.call_soon_threadsafe(_deliver, mine)


def _deliver(told: Sequence[Told]) -> None:
    for reply, events, failure in told:
        reply.deliver(events, failure)


def fitting_threads(model: Transformer) -> int:
    """How many cores a step takes unless told: one where the model is small, since operations of some microseconds gain nothing from a
    second core, and stand still while something else has it; else as torch finds them."""
    small = model.embedding.weight.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL
    return 1 if small else torch.get_num_threads()


def fitting_rows(model: Transformer) -> int:
    """How many texts are made side by side unless told: as many as the cache has room for, up to `MOST_ROWS`."""
    row = model.new_cache(1, model.config.context_length).bytes_when_full
    return max(1, min(MOST_ROWS, CACHE_BYTES // max(1, row)))
