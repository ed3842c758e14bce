"""Texts from prompts: streamed as whole characters, ended before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import Tokenizer
from gptlab.generate.engine import Made, generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.speculative import Proposer, speculate
from gptlab.model.transformer import Transformer

BROKEN = "\ufffd"  # what half a character decodes to


class TextStream:
    """The text of tokens that come one by one: never half a character, nothing that may yet turn out to begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []  # those whose characters are not whole yet
        self._held = ""  # what may begin a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """What this token adds to the text for certain; nothing more once a stop string was met."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decoded()
        # A character has at most four bytes: what is still broken after four tokens is no character at all.
        if text.endswith(BROKEN) and len(self._tokens) < 4:
            return ""
        self._tokens.clear()
        return self._let_go(self._held + text)

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        if self.stopped:
            return ""
        rest = self._let_go(self._held + (self._decoded() if self._tokens else ""))
        rest, self._held = rest + self._held, ""
        self._tokens.clear()
        return rest

    def _decoded(self) -> str:
        """The text of the tokens in hand. By their bytes, where the tokeniser tells them: some take the first of any tokens for the
        beginning of a text, and its space away."""
        token_bytes = getattr(self._tokenizer, "token_bytes", None)
        if token_bytes is None:
            return self._tokenizer.decode(self._tokens)
        return b"".join(token_bytes(token) for token in self._tokens).decode("utf-8", errors="replace")

    def _let_go(self, text: str) -> str:
        found = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        kept = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


@dataclass
class Completion:
    """One text: which prompt it goes on from, which sample of it, and why it ended (`stop`: the end-of-text token or a stop string)."""

    prompt: int
    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish: str = "length"


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: Sampling,
    *,
    samples: int = 1,
    logprobs: bool = False,
    proposer: Callable[[Sampling], Proposer] | None = None,
    streamed: Callable[[Completion, str], None] = lambda _, __: None,
) -> list[Completion]:
    """A text after each prompt, `samples` of each. `streamed` gets each piece of text as it is certain.

    With a `proposer` texts are made one after the other, by speculative decoding; it knows no log-probabilities.
    Raises ConfigError for settings that mean nothing, an empty prompt, or one that holds what the tokeniser lacks.
    """
    settings.check()
    if not all(prompts):
        raise ConfigError("the prompt is empty; give at least one character")
    if samples < 1:
        raise ConfigError(f"--samples {samples} must be at least 1")
    found = [Completion(i, j, logprobs=[] if logprobs else None) for i in range(len(prompts)) for j in range(samples)]
    streams = [TextStream(tokenizer, settings.stop) for _ in found]

    def tell(completion: Completion, text: str) -> None:
        completion.text += text
        if text:
            streamed(completion, text)

    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if proposer is not None:
        for one, stream in zip(found, streams, strict=True):
            own = replace(settings, seed=settings.seed + one.sample)
            for token in speculate(model, encoded[one.prompt], own, proposer(own), end=tokenizer.end_of_text):
                one.tokens.append(token)
                tell(one, stream.feed(token))
                if stream.stopped:
                    break
            _end(one, stream, settings, tell)
        return found

    def ended(made: Made) -> bool:
        return streams[made.row].stopped

    for made in generate(model, encoded, settings, samples=samples, end=tokenizer.end_of_text, ended=ended, logprobs=logprobs):
        one = found[made.row]
        one.tokens.append(made.token)
        if one.logprobs is not None and made.logprob is not None:
            one.logprobs.append(made.logprob)
        tell(one, streams[made.row].feed(made.token))
    for one, stream in zip(found, streams, strict=True):
        _end(one, stream, settings, tell)
    return found


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, behind that which an imported model may expect before every text."""
    begin = getattr(tokenizer, "begin_of_text", None)
    return [*([] if begin is None else [begin]), *(int(token) for token in tokenizer.encode(prompt))]


def _end(one: Completion, stream: TextStream, settings: Sampling, tell: Callable[[Completion, str], None]) -> None:
    tell(one, stream.finish())
    if stream.stopped or len(one.tokens) < settings.max_tokens:
        one.finish = "stop"
