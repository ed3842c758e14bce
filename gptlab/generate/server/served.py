"""A model that is served: what it is called, and its requests' prompts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.data.chat import Message, chat_format, end_tokens, render
from gptlab.data.tokenizer import Tokenizer
from gptlab.generate.server.errors import Refused
from gptlab.generate.server.fields import Limits, Request
from gptlab.generate.server.scheduler import Ask, Scheduler
from gptlab.generate.text import prompt_ids
from gptlab.model.transformer import Transformer


@dataclass(eq=False)
class Served:
    """`name`: what the API calls it; `label`: what a person reads; `aliases`: other names it answers to; `run`: its run's identity."""

    name: str
    label: str
    model: Transformer
    tokenizer: Tokenizer
    aliases: tuple[str, ...] = ()
    run: str | None = None
    rows: int | None = None
    queue: int = 64
    threads: int | None = None
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.format = chat_format(self.tokenizer)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.scheduler = Scheduler(self.model, self.tokenizer, rows=self.rows, queue=self.queue, threads=self.threads)
        self._texts: dict[int, tuple[str, list[int]]] = {}

    def described(self, created: int) -> dict[str, Any]:
        """Its line of /v1/models: OpenAI's fields, and what the page shows."""
        return {
            "id": self.name, "object": "model", "created": created, "owned_by": "gptlab", "label": self.label,
            "chat_format": self.format.name if self.format else None, "context_length": self.model.config.context_length,
            "vocabulary": self.tokenizer.vocabulary, "parameters": self.parameters,
        }  # fmt: skip

    def asks(self, asked: Request, limits: Limits) -> list[Ask]:
        """A request's prompts as tokens. Raises Refused 400 for what the tokeniser does not know, or a prompt that is too long."""
        ends = end_tokens(self.tokenizer)
        if asked.messages:
            if self.format is None:
                message = f"{self.name} is a base model without a chat format: it continues text; use /v1/completions"
                raise Refused(400, message, param="model", code="no_chat_format")
            ends = self.format.ends
            prompts: Sequence[tuple[int, ...]] = [self._rendered(asked.messages)]
        else:
            prompts = [self._encoded(prompt) if isinstance(prompt, str) else self._checked(prompt, "prompt") for prompt in asked.prompts]
        answer = self._checked(asked.answer, "answer_tokens")
        found = []
        for prompt in prompts:
            if len(prompt) > limits.prompt:
                told = f"the prompt has {len(prompt):,} tokens, more than the {limits.prompt:,} that this server takes"
                raise Refused(400, told, param="messages" if asked.messages else "prompt", code="context_length_exceeded")
            settings = tuple(replace(asked.settings, seed=(asked.settings.seed + i) % 2**63) for i in range(asked.n))
            found.append(Ask((*prompt, *answer), settings, ends, asked.top))
        return found

    def told(self, token: int) -> tuple[str, list[int]]:
        """A token's text, and its bytes."""
        if token not in self._texts:
            try:
                whole: bytes = getattr(self.tokenizer, "token_bytes", lambda _: b"")(token)
            except KeyError:  # a special token
                whole = b""
            # By its bytes, where they are told: decoding a single token takes some for the beginning of a text, and their space away.
            text = whole.decode("utf-8", errors="replace") if whole else self.tokenizer.decode([token])
            self._texts[token] = text, list(whole or text.encode("utf-8", errors="replace"))
        return self._texts[token]

    def _encoded(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(prompt_ids(self.tokenizer, text))
        except ConfigError as error:
            raise Refused(400, str(error), param="prompt") from error

    def _rendered(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        try:
            return tuple(render(messages, self.tokenizer).tokens)
        except ConfigError as error:
            raise Refused(400, str(error), param="messages") from error

    def _checked(self, tokens: tuple[int, ...], name: str) -> tuple[int, ...]:
        beyond = next((token for token in tokens if token >= self.tokenizer.vocabulary), None)
        if beyond is not None:
            raise Refused(400, f"{name} holds {beyond}, and {self.name} knows the tokens 0 to {self.tokenizer.vocabulary - 1}", param=name)
        return tokens
