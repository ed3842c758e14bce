"""Rollouts: what a model answers to problems, as text to be rewarded and as rows to be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.data.loader import Batch
from gptlab.data.problems import Problem, encoded, ends_of
from gptlab.data.tokenizer import Tokenizer
from gptlab.generate.engine import Made, generate
from gptlab.generate.sampling import Sampling
from gptlab.model.transformer import Transformer
from gptlab.objective.reward import Sample


@dataclass(frozen=True)
class Rollout:
    """One completion: the tokens of its prompt, its own with the one that ended it, and all of it as text."""

    prompt: list[int]
    completion: list[int]
    sample: Sample


def seed_of(*parts: int) -> int:
    """A seed of 63 bits for what the numbers name: a run's seed, a problem, a sample."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest(), "little") >> 1


def roll_out(
    model: Transformer,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    seeds: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_tokens: int,
    at_once: int,
) -> list[Rollout]:
    """Completions of each problem, one for each of its seeds (as many for each): those of the first problem, of the second, …

    `max_tokens` is the most of a completion (0: what the context holds after the prompt), `at_once` how many are made side by side.
    What one draws does not depend on the others. Raises ConfigError for a prompt that leaves no room in the model's context.
    """
    room = model.config.context_length + 1  # the last token is written, and never read
    prompts = [encoded(problem, tokenizer) for problem in problems]
    ends = [ends_of(problem, tokenizer) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= room:
            raise ConfigError(
                f"the prompt {problem.text[:80]!r} has {len(prompt)} tokens, and model.context_length={room - 1} "
                "leaves no room for an answer"
            )
    group = len(seeds[0]) if seeds else 0
    made = [list[int]() for _ in range(len(problems) * group)]
    step = max(1, at_once // max(1, group))
    for first in range(0, len(problems), step):
        here = range(first, min(first + step, len(problems)))
        settings = [
            Sampling(max_tokens=min(problems[i].tokens or max_tokens or room, room - len(prompts[i])), temperature=temperature, seed=seed)
            for i in here
            for seed in seeds[i]
        ]

        def over(token: Made, first: int = first) -> bool:
            return token.token in ends[first + token.row // group]

        for token in generate(model, [prompts[i] for i in here], settings, ended=over):
            made[first * group + token.row].append(token.token)
    found = []
    for row, completion in enumerate(made):
        problem, end = problems[row // group], ends[row // group]
        closed = completion[-1] in end
        text = tokenizer.decode(completion[:-1] if closed else completion)
        ended = closed or len(completion) == problem.tokens
        sample = Sample(problem.text, text, problem.answer, ended, len(completion), problem.entry)
        found.append(Rollout(prompts[row // group], completion, sample))
    return found


def as_batch(rollouts: Sequence[Rollout], *, documents: bool) -> tuple[Batch, Float[Tensor, "b t"]]:
    """Rows of prompt and completion, and which targets are the completion's own (1; else 0).

    A row shorter than the longest is filled behind its end with token 0, which nothing before it sees and nothing scores.
    """
    rows = [[*r.prompt, *r.completion] for r in rollouts]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros(tokens.shape)
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, len(rollout.prompt) : len(row)] = 1
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return Batch(inputs, targets, document=torch.zeros_like(inputs) if documents else None), mask[:, 1:]
