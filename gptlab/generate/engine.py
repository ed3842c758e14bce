"""Generation: texts side by side, each token fed once, each row as long as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.generate import step
from gptlab.generate.sampling import Sampling, draw
from gptlab.model.cache import KVCache
from gptlab.model.transformer import Transformer

READ = 4096  # tokens of prompts that are read at a time: more are no faster, and take more memory


@dataclass(frozen=True)
class Made:
    """A token of row `row`. `logprob`: its log-probability under the model, before temperature and cuts, where that was asked for;
    `likeliest`: the likeliest tokens in its place with theirs, the likeliest first."""

    row: int
    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Row:
    """One text in the making."""

    number: int
    tokens: list[int]  # the prompt's, then its own
    settings: Sampling
    generator: torch.Generator
    made: int = 0
    done: bool = False
    top: int | None = None  # how many of the likeliest tokens are told with each of its own; None: no log-probability either


class Reading:
    """A prompt that is read piece by piece, so that rows under way need not wait for all of it."""

    def __init__(self, model: Transformer, tokens: Sequence[int]) -> None:
        """Of a prompt longer than the context the end is read."""
        self.model, self.tokens = model, list(tokens)[-model.config.context_length :]
        self.cache = model.new_cache(1, model.config.context_length)
        self.logits: Float[Tensor, "1 v"] | None = None  # of the token after what was read

    @property
    def left(self) -> int:
        """Tokens that are not read yet."""
        return len(self.tokens) - self.cache.length

    @torch.inference_mode()
    def go_on(self, most: int) -> None:
        """Read up to so many more tokens."""
        part = self.tokens[self.cache.length : self.cache.length + most]
        read = torch.tensor([part], device=self.model.embedding.weight.device)
        self.logits = self.model(read, cache=self.cache, reduce=_of_last)


class Engine:
    """Rows that are generated side by side; they come and go between steps.

    A row that has filled the model's context forgets its older half, and the rest is read anew: a text may be of any length, and a token
    costs the same on average.
    """

    def __init__(self, model: Transformer, *, logprobs: bool = False) -> None:
        self.model, self.logprobs = model, logprobs
        self.context = model.config.context_length
        self._step = step.of(model)
        self.rows: list[Row] = []
        self._cache: KVCache | None = None
        self._logits: Float[Tensor, "b v"] | None = None  # of each row's next token

    def add(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], numbers: Sequence[int], *, top: int | None = None
    ) -> None:
        """Rows, the same count of each prompt, which is read once. Of a prompt longer than the context the end is read.

        Prompts of one length are read side by side, up to READ tokens at a time. `top`: as a row's. Raises ConfigError for an empty one.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ConfigError("the prompt is empty; give at least one character")
        copies = len(settings) // max(1, len(prompts))
        assert len(settings) == len(numbers) == copies * len(prompts)
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(min(len(prompt), self.context), []).append(i)
        read = []
        for length, alike in by_length.items():
            most = max(1, READ // length)
            for part in (alike[start : start + most] for start in range(0, len(alike), most)):
                for i in part:
                    for n in range(i * copies, (i + 1) * copies):
                        self._begin(prompts[i], settings[n], numbers[n], top)
                read.append(self._read([prompts[i][-length:] for i in part], copies))
        if read:
            self._join(*read)

    def take(
        self, prompt: Sequence[int], reading: Reading, settings: Sequence[Sampling], numbers: Sequence[int], *, top: int | None = None
    ) -> None:
        """Rows with one prompt that was read, to its end, by `reading`. `top`: as a row's."""
        assert reading.logits is not None
        assert not reading.left
        for number, own in zip(numbers, settings, strict=True):
            self._begin(prompt, own, number, top)
        if len(settings) > 1:
            reading.cache.select([0] * len(settings))
        self._join((reading.cache, reading.logits.expand(len(settings), -1)))

    def _begin(self, prompt: Sequence[int], own: Sampling, number: int, top: int | None) -> None:
        top = 0 if top is None and self.logprobs else top
        self.rows.append(Row(number, list(prompt), own, torch.Generator().manual_seed(own.seed), top=top))

    def step(self) -> list[Made]:
        """The next token of every row. Rows whose `done` was set, or that have all their tokens, are gone afterwards."""
        assert self._logits is not None
        with torch.inference_mode():
            tokens = draw(
                self._logits,
                [row.settings for row in self.rows],
                [row.generator for row in self.rows],
                [row.tokens for row in self.rows],
            )
            made = self._told(tokens)
        for row, token in zip(self.rows, tokens, strict=True):
            row.tokens.append(token)
            row.made += 1
            row.done = row.made >= row.settings.max_tokens
        return made

    def _told(self, tokens: Sequence[int]) -> list[Made]:
        """The tokens of the rows, with the log-probabilities that each row asks for."""
        asked = [i for i, row in enumerate(self.rows) if row.top is not None]
        if not asked:
            return [Made(row.number, token) for row, token in zip(self.rows, tokens, strict=True)]
        assert self._logits is not None
        spread = (self._logits if len(asked) == len(self.rows) else self._logits[asked]).float().log_softmax(-1)
        own = spread[range(len(asked)), [tokens[i] for i in asked]].tolist()
        most = min(max(self.rows[i].top or 0 for i in asked), spread.shape[-1])
        values, places = (found.tolist() for found in spread.topk(most)) if most else ([[]] * len(asked), [[]] * len(asked))
        made = [Made(row.number, token) for row, token in zip(self.rows, tokens, strict=True)]
        for j, i in enumerate(asked):
            top = self.rows[i].top
            made[i] = replace(made[i], logprob=own[j], likeliest=tuple(zip(places[j][:top], values[j][:top], strict=True)))
        return made

    def advance(self) -> None:
        """Drop the rows that are done and feed the others their newest token."""
        kept = [i for i, row in enumerate(self.rows) if not row.done]
        self._keep(kept)
        if not self.rows:
            return
        assert self._cache is not None
        full = [i for i in range(len(self.rows)) if self._cache.lengths[i] >= self.context]
        if full:
            rows = [self.rows[i] for i in full]
            self._keep([i for i in range(len(self.rows)) if i not in full])
            if self.rows:
                self._feed()
            for row in rows:
                self.rows.append(row)
                self._join(self._read([row.tokens[-max(1, self.context // 2) :]]))
            return
        self._feed()

    def _keep(self, kept: Sequence[int]) -> None:
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self._cache = self._logits = None
            return
        assert self._cache is not None
        assert self._logits is not None
        self._cache.select(kept)
        self._logits = self._logits[list(kept)]

    @torch.inference_mode()
    def _feed(self) -> None:
        tokens = [row.tokens[-1] for row in self.rows]
        if self._step is not None and self._step.takes(len(tokens)):
            assert self._cache is not None
            self._logits = self._step(tokens, self._cache)
            return
        newest = torch.tensor(tokens, device=self._device)[:, None]
        self._logits = self.model(newest, cache=self._cache, reduce=_of_last)

    @torch.inference_mode()
    def _read(self, texts: Sequence[Sequence[int]], copies: int = 1) -> tuple[KVCache, Tensor]:
        cache = self.model.new_cache(len(texts), self.context)
        read = torch.tensor([list(text) for text in texts], device=self._device)
        logits = self.model(read, cache=cache, reduce=_of_last)
        if copies > 1:
            cache.select([i for i in range(len(texts)) for _ in range(copies)])
        return cache, logits.repeat_interleave(copies, 0)

    def _join(self, *read: tuple[KVCache, Tensor]) -> None:
        """Append rows that were read: all at once, since each time all that are there are copied."""
        held = [] if self._cache is None or self._logits is None else [(self._cache, self._logits)]
        caches, logits = zip(*held, *read, strict=True)
        caches[0].join(*caches[1:])
        self._cache, self._logits = caches[0], torch.cat(logits)

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device


def _of_last(features: Float[Tensor, "b t d"], model: Transformer) -> Float[Tensor, "b v"]:
    """Logits of the next token alone, within the model's own call: a sharded model has its weights there and nowhere else."""
    return model.logits(features[:, -1])


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: Sampling | Sequence[Sampling],
    *,
    samples: int = 1,
    end: int | None = None,
    ended: Callable[[Made], bool] = lambda _: False,
    logprobs: bool = False,
) -> Iterator[Made]:
    """Tokens after each prompt, as they are made; `samples` texts a prompt: row i * samples + j is the j-th of prompt i.

    `settings`: of all rows (each sample then has the seed after the one before it), or one for each row. The `end` token ends a row and
    is not given out; so does a token of which `ended` is true, which is. The model is in evaluation mode meanwhile.
    Raises ConfigError for settings that mean nothing or an empty prompt.
    """
    if isinstance(settings, Sampling):
        settings = [replace(settings, seed=settings.seed + j) for _ in prompts for j in range(samples)]
    for each in settings:
        each.check()
    was_training = model.training
    model.eval()
    try:
        engine = Engine(model, logprobs=logprobs)
        engine.add(prompts, settings, range(len(settings)))
        while engine.rows:
            for row, made in zip(list(engine.rows), engine.step(), strict=True):
                if made.token == end:
                    row.done = True
                else:
                    yield made
                    row.done = row.done or ended(made)
            engine.advance()
    finally:
        model.train(was_training)
