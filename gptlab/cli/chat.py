"""`gptlab chat RUN`: a conversation in the terminal, or, with a model that knows no chat, a text that both write."""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.registry import suggest
from gptlab.data.chat import Message, chat_format, check, end_tokens, render
from gptlab.generate.engine import Made, generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.text import TextStream, prompt_ids
from gptlab.generate.weights import for_generation
from gptlab.hardware.device import machine
from gptlab.runner.load import Loaded, load
from gptlab.tracker.console import console

NUMBERS: dict[str, type] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "max_tokens": int, "seed": int,
}  # fmt: skip
HELP = {
    "/temperature 0.7": "0: always the likeliest token; likewise /top_k, /top_p, /min_p, /repetition_penalty, /max_tokens, /seed",
    "/settings": "show them all",
    "/system TEXT": "what a model with chat tokens is told before the conversation; without a text none",
    "/reset": "forget the conversation",
    "/save FILE": "write it to a file: JSON for .json, else text",
    "/help": "this list",
    "/quit": "leave; so do Ctrl-D and Ctrl-C",
}


@dataclass
class Talk:
    """A conversation: messages where the model has a chat format, else one text that goes on."""

    loaded: Loaded
    settings: Sampling
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        self.format = chat_format(self.loaded.tokenizer)

    def say(self, said: str) -> Iterator[str]:
        """The answer, in pieces. A base model goes on with all that was written so far and `said`. Raises ConfigError for what the
        tokeniser does not know, and then forgets it."""
        tokenizer = self.loaded.tokenizer
        if self.format is None:
            prompt = prompt_ids(tokenizer, self.text + said)
            self.text += said
            ends = end_tokens(tokenizer)
        else:
            asked = [*self.messages, Message("user", said)]
            prompt = render([*([Message("system", self.system)] if self.system else []), *asked], tokenizer).tokens
            self.messages, ends = asked, self.format.ends
        answer = ""
        try:
            for piece in self._pieces(prompt, ends):
                answer += piece
                yield piece
        finally:  # an answer that was stopped is as it is
            if self.format is None:
                self.text += answer
            elif answer:
                self.messages.append(Message("assistant", answer))
            else:
                self.messages = self.messages[:-1]
            self.settings = replace(self.settings, seed=self.settings.seed + 1)

    def _pieces(self, prompt: list[int], ends: frozenset[int]) -> Iterator[str]:
        stream, over = TextStream(self.loaded.tokenizer, self.settings.stop), False

        def ended(made: Made) -> bool:
            return over or stream.stopped

        for made in generate(self.loaded.model, [prompt], self.settings, ended=ended):
            over = made.token in ends
            if over:
                break
            yield stream.feed(made.token)
        yield stream.finish()

    def reset(self) -> None:
        self.messages, self.text = [], ""

    def saved(self) -> dict[str, Any]:
        """What /save writes as JSON."""
        told = {name: getattr(self.settings, name) for name in NUMBERS}
        if self.format is None:
            return {"text": self.text, "settings": told}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": system + [{"role": m.role, "content": m.content} for m in self.messages], "settings": told}


def chat(run: str, *, system: str, settings: Sampling, checkpoint: str, weights: str, device: str, precision: str) -> None:
    """Talk until /quit or the end of the input. Raises ConfigError for settings that mean nothing."""
    settings.check()
    if device.split(":")[0] not in machine().devices:
        raise ConfigError(f"--device {device}: this machine has {', '.join(machine().devices)}")
    loaded = load(run, checkpoint=checkpoint, weights=weights, device=device)
    for_generation(loaded.model, precision)
    talk = Talk(loaded, settings, system)
    if system and talk.format is None:
        raise ConfigError("--system: a base model knows no messages; it goes on with your text")
    by_hand = sys.stdin.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):  # Windows: its terminal has a history of its own
            import readline  # noqa: F401 - the arrow keys go through what was written
        about = "answers" if talk.format else "a base model: it goes on with your text"
        name = loaded.run.directory.name if loaded.run else run
        console.print(f"{name} ({about}); /help tells what else there is", style="dim", markup=False)
    while True:
        try:
            line = input("> " if by_hand else "")
        except (EOFError, KeyboardInterrupt):
            if by_hand:
                print()
            return
        if line.startswith("/") and line.split()[0] in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(talk, line)
            elif line or (talk.format is None and talk.text):
                _answer(talk, line)
        except (ConfigError, IOFailure) as error:
            console.print(f"{error}", style="red", markup=False)


def _answer(talk: Talk, line: str) -> None:
    try:
        for piece in talk.say(line):
            print(_plain(piece), end="", flush=True)
    except KeyboardInterrupt:  # the answer is to end, not the conversation
        pass
    print()


def _plain(text: str) -> str:
    """The text without what a terminal would obey: a model may have learned to write escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _command(talk: Talk, line: str) -> None:
    """Raises ConfigError for what is no command or no value of a setting."""
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    if name == "help":
        for shown, what in HELP.items():
            console.print(f"  {shown:<18} {what}", markup=False)
    elif name == "settings":
        console.print("  " + ", ".join(f"{own} {getattr(talk.settings, own)}" for own in NUMBERS), markup=False)
    elif name in NUMBERS:
        talk.settings = _changed(talk.settings, name, value)
        console.print(f"  {name} {getattr(talk.settings, name)}", style="dim", markup=False)
    elif name == "system":
        if talk.format is None:
            raise ConfigError("/system: a base model knows no messages; it goes on with your text")
        if value:
            check([Message("system", value)])
        talk.system = value
    elif name == "reset":
        talk.reset()
    elif name == "save":
        _save(talk, value)
    else:
        known = [*NUMBERS, *(shown.split()[0][1:] for shown in HELP)]
        raise ConfigError(f"/{name} is no command{suggest(name, known)}; /help tells them")


def _changed(settings: Sampling, name: str, value: str) -> Sampling:
    kind = NUMBERS[name]
    try:
        number = kind(value)
    except ValueError as error:
        what = "a number" if kind is float else "a whole number"
        raise ConfigError(f"/{name} {value!r} must be {what}") from error
    return replace(settings, **{name: number}).check("/")


def _save(talk: Talk, value: str) -> None:
    if not value:
        raise ConfigError("/save takes a file: /save talk.json")
    file, saved = Path(value).expanduser(), talk.saved()
    written = json.dumps(saved, indent=1, ensure_ascii=False) + "\n"
    if file.suffix != ".json":
        written = saved.get("text") or "\n\n".join(f"{m['role']}: {m['content']}" for m in saved.get("messages", []))
    try:
        file.write_text(written, encoding="utf-8")
    except OSError as error:
        raise IOFailure(f"/save {file}: {error.strerror}") from error
    console.print(f"  saved to {file}", style="dim", markup=False)
