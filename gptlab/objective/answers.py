"""How many held-out problems a model solves when it answers greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptlab.data.problems import Problems
from gptlab.objective.protocol import Training
from gptlab.objective.reward import Reward, exact_answer
from gptlab.objective.rollout import Rollout, roll_out

AT_ONCE = 256


@dataclass(frozen=True)
class Answered:
    """Shares of the problems that were solved (the answer has ended, and is right) and ended; the mean reward."""

    solved: float
    ended: float
    reward: float


def answered(
    training: Training,
    source: Problems,
    count: int,
    *,
    max_tokens: int = 0,
    right: Reward | None = None,
    rewards: Callable[[Sequence[Rollout]], list[float]] | None = None,
) -> Answered:
    """Answer the first `count` held-out problems, the likeliest token each time; the ranks share the work.

    `right`: gives 1 to a right answer; unless given, to the right text but for white space.
    """
    world = training.world
    own = range(world.rank, count, world.size)
    rollouts = roll_out(
        training.trained,
        source.problems(own, 0, held_out=True),
        training.data.tokenizer,
        [[0]] * len(own),
        temperature=0.0,
        max_tokens=max_tokens,
        at_once=AT_ONCE,
    )
    right = right or exact_answer()
    solved = sum(r.sample.ended and right(r.sample) >= 1 for r in rollouts)
    given = sum(rewards(rollouts)) if rewards is not None and rollouts else 0.0
    sums = world.gather(solved, sum(r.sample.ended for r in rollouts), given)
    return Answered(*(sum(rank[i] for rank in sums) / count for i in range(3)))
