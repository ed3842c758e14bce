"""`gptlab bench serve RUN`: a server of its own, one client of it and many at once, and its memory over many requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gptlab.config.errors import ConfigError, GptlabError
from gptlab.study.tables import table
from gptlab.tracker.console import console, say

SHORT = 40  # tokens of each of the many requests over which memory is watched
PROMPT = "the "


@dataclass(frozen=True)
class Answered:
    """One stream: seconds until its first token and its end, its tokens, and whether it came to its end."""

    first: float
    seconds: float
    tokens: int
    whole: bool


@dataclass(frozen=True)
class Round:
    """One client, then many at once. Rates in tokens/s, times in seconds. `slowest` over `fastest`: how unequally the clients fared."""

    alone: float
    first: float
    together: float
    first_of_last: float
    fastest: float
    slowest: float
    whole: int

    @property
    def times(self) -> float:
        return self.together / self.alone


def bench(run: str, *, clients: int, tokens: int, rounds: int, requests: int, as_json: bool) -> None:
    """Raises ConfigError for a run that cannot be served, or counts that mean nothing."""
    for name, value, least in (("clients", clients, 1), ("tokens", tokens, 2), ("rounds", rounds, 1), ("requests", requests, 0)):
        if value < least:
            raise ConfigError(f"--{name} {value} must be at least {least}")
    with _server(run, clients) as (port, process):
        found, memory = asyncio.run(_measure(port, process, clients, tokens, rounds, requests))
    if as_json:
        told = [asdict(one) | {"times": one.times} for one in found]
        print(json.dumps({"clients": clients, "tokens": tokens, "rounds": told, "memory": memory}, indent=1))
        return
    head = ("", "tokens/s", "first token", "first to last end")
    rows = []
    for one in found:
        rows.append(("one client", f"{one.alone:,.0f}", f"{1e3 * one.first:.0f} ms", ""))
        ends = f"{one.fastest:.2f} to {one.slowest:.2f} s"
        rows.append((f"{clients} at once", f"{one.together:,.0f} ({one.times:.1f}x)", f"by {1e3 * one.first_of_last:.0f} ms", ends))
    console.print(table(f"streamed completions of {tokens} tokens", head, rows))
    whole = sum(one.whole for one in found)
    say(f"  median {statistics.median(one.times for one in found):.1f} times one client; {whole} of {rounds * clients} streams whole")
    if len(memory) > 1:
        say(f"  memory before and after each tenth of {requests:,} requests, in MB: {', '.join(f'{m / 1e6:.0f}' for m in memory)}")


@contextlib.contextmanager
def _server(run: str, clients: int) -> Iterator[tuple[int, int]]:
    """A `gptlab serve` of its own, on a free port: the port and its process id."""
    command = [sys.executable, "-m", "gptlab", "serve", run, "--port", "0", "--queue", str(max(64, clients))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    try:
        assert process.stdout is not None
        port = next((int(found[1]) for line in process.stdout if (found := re.match(r"http://127\.0\.0\.1:(\d+)/", line))), None)
        if port is None:
            said = process.communicate()[1].strip().removeprefix("gptlab: ")
            raise ConfigError(said) if process.returncode == ConfigError.code else GptlabError(said)
        yield port, process.pid
    finally:
        process.terminate()
        process.communicate()


async def _measure(port: int, process: int, clients: int, tokens: int, rounds: int, requests: int) -> tuple[list[Round], list[int]]:
    await _ask(port, 0, tokens)  # what is made at the first request
    found = []
    for i in range(rounds):
        alone = await _ask(port, i, tokens)
        began = time.perf_counter()
        many = await asyncio.gather(*(_ask(port, seed, tokens) for seed in range(clients)))
        took = time.perf_counter() - began
        found.append(_round(alone, many, took))
    memory, gate = [_resident(process)], asyncio.Semaphore(clients)

    async def held(seed: int) -> Answered:
        async with gate:
            return await _ask(port, seed, SHORT)

    for tenth in range(10 if requests else 0):
        many = await asyncio.gather(*(held(seed) for seed in range(requests * tenth // 10, requests * (tenth + 1) // 10)))
        if not all(one.whole for one in many):
            raise GptlabError("a stream was cut off")
        memory.append(_resident(process))
    return found, [m for m in memory if m]


def _round(alone: Answered, many: Sequence[Answered], took: float) -> Round:
    ends = [one.seconds for one in many]
    return Round(
        alone=alone.tokens / alone.seconds,
        first=alone.first,
        together=sum(one.tokens for one in many) / took,
        first_of_last=max(one.first for one in many),
        fastest=min(ends),
        slowest=max(ends),
        whole=sum(one.whole for one in many),
    )


async def _ask(port: int, seed: int, tokens: int) -> Answered:
    body = {
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = json.dumps(body).encode()
    # HTTP/1.0, whose answer is what comes until the connection ends: the client is to cost as little as it can.
    head = f"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + sent)
    first, got = 0.0, b""
    while part := await reader.read(1 << 16):
        got += part
        if not first and b"\ndata: " in got:
            first = time.perf_counter() - began
    writer.close()
    if not got.split(b"\r\n", 1)[0].endswith(b" 200 OK"):
        raise GptlabError(f"the server answered {got[:300].decode(errors='replace')!r}")
    usage = re.search(rb'"completion_tokens":(\d+)', got)
    return Answered(first, time.perf_counter() - began, int(usage[1]) if usage else 0, got.endswith(b"data: [DONE]\n\n"))


def _resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
