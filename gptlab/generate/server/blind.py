"""Blind pairs: two models under the names A and B, which of them is which known to the server alone until there is a vote."""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.generate.server.errors import Refused
from gptlab.generate.server.fields import Request
from gptlab.generate.server.served import Served

SIDES = ("a", "b")
VOTES = ("a", "b", "tie", "bad")
MOST_PAIRS = 100  # that are open at once, each with its prompt; the oldest are forgotten
LONGEST = 20_000  # characters of a prompt and of an answer that are kept with a vote


@dataclass
class Pair:
    """Two models in random order, what they were asked, and what they answered."""

    models: dict[str, Served]
    asked: Request | None = None
    answers: dict[str, str] = field(default_factory=dict)


class Pairs:
    """The pairs that no vote was given on yet. `file`: where the votes on two models go."""

    def __init__(self, file: Callable[[Served, Served], Path]) -> None:
        self._file = file
        self._open: OrderedDict[str, Pair] = OrderedDict()
        self._random = random.SystemRandom()

    def begin(self, models: Sequence[Served]) -> str:
        """A new pair of these models; of more than two, two drawn at random. Raises Refused 400 for fewer than two."""
        if len(set(models)) < 2:
            raise Refused(400, "a blind pair takes two different models; serve two runs", param="models")
        order = self._random.sample(list(dict.fromkeys(models)), 2)
        name = secrets.token_hex(8)
        self._open[name] = Pair(dict(zip(SIDES, order, strict=True)))
        while len(self._open) > MOST_PAIRS:
            self._open.popitem(last=False)
        return name

    def find(self, name: str) -> tuple[Served, Callable[[Request], Callable[[str], None]]] | None:
        """The model behind `blind-PAIR-a`, and what notes its request and then its answer; None where the name is not of that kind."""
        parts = name.split("-")
        if len(parts) != 3 or parts[0] != "blind" or parts[2] not in SIDES or parts[1] not in self._open:
            return None
        pair, side = self._open[parts[1]], parts[2]

        def noting(asked: Request) -> Callable[[str], None]:
            if pair.asked is not None and (pair.asked.messages, pair.asked.prompts) != (asked.messages, asked.prompts):
                raise Refused(400, "both models of a blind pair are asked the same", param="messages" if asked.messages else "prompt")
            pair.asked = asked

            def note(answer: str) -> None:
                pair.answers[side] = answer

            return note

        return pair.models[side], noting

    def vote(self, name: Any, vote: Any) -> dict[str, Any]:
        """Note a vote on a pair, and tell which was which. Raises Refused: 422 for a vote that is none, 404 for a pair that is not open
        (any more), 400 where it has not answered."""
        if vote not in VOTES:
            raise Refused(422, f"vote must be one of {', '.join(VOTES)}", param="vote")
        pair = self._open.get(name) if isinstance(name, str) else None
        if pair is None:
            raise Refused(404, "there is no such pair, or it has its vote already", param="pair")
        if pair.asked is None or set(pair.answers) != set(SIDES):
            raise Refused(400, "a vote needs both answers of the pair to be whole", param="pair")
        first, second = (pair.models[side] for side in SIDES)
        settings = pair.asked.settings
        sides = {
            side: {"run": served.run, "label": served.label, "answer": pair.answers[side][:LONGEST]} for side, served in pair.models.items()
        }
        line = {
            "time": time.time(), "pair": name, "vote": vote, **sides,
            "messages": [[m.role, m.content[:LONGEST]] for m in pair.asked.messages],
            "prompt": [str(prompt)[:LONGEST] for prompt in pair.asked.prompts],
            "settings": {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p,
                         "repetition_penalty": settings.repetition_penalty, "max_tokens": settings.max_tokens},
        }  # fmt: skip
        append(self._file(first, second), line)
        del self._open[name]
        return {"pair": name, "vote": vote} | {side: {"model": s.name, "label": s.label} for side, s in pair.models.items()}


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines, durably; one that was cut off before it stays a line by itself, which readers leave out."""
    written = json.dumps(line) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as opened:
            if opened.tell():
                opened.seek(-1, os.SEEK_END)
                written = written if opened.read(1) == b"\n" else f"\n{written}"
            opened.write(written.encode())
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise Refused(500, f"the vote could not be written ({error.strerror})", code="votes") from error
