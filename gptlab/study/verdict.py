"""The verdict on each arm: better, worse, no difference worth knowing, or undecided and by how many seeds.

What it covers: the chance of the seeds. Never a run's best checkpoint: each loss is of the last step of a finished schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gptlab.study.statistics import (
    CONFIDENCE,
    Estimate,
    Interval,
    blocked,
    bootstrap,
    holm,
    paired,
    repeated_level,
    repeated_p,
    seeds_for,
    variance_bounds,
    variance_ratio_tails,
)

LEVEL = 1 - CONFIDENCE
EFFECT = 0.01  # nats a token: the smallest difference worth knowing, unless another is named
PAIRED_FROM, BOOTSTRAP_FROM = 8, 10  # seeds
# An arm is judged by its own spread alone where that is larger than the others' (p of an F-test), or of another kind altogether: as
# small as that of two kernels. Among arms that spread alike, leaving out by chance those that look quiet would make false verdicts.
WIDER, QUIETER = 0.02, 1e-4

Losses = Mapping[int, float]  # of one arm, by seed


@dataclass(frozen=True)
class Verdict:
    """`kind`: better, worse, same (no difference beyond `bound`), undecided (a true difference of `effect` takes
    about `more` seeds, `more_least` to `more_most`, one as large as was found `more_found`; None: over MOST_SEEDS). `p` is of this arm
    alone, `p_holm` corrected for all arms; `interval` covers the seeds."""

    kind: str
    interval: Interval | None
    method: str
    p: float | None = None
    p_holm: float | None = None
    effect: float = EFFECT
    bound: float | None = None
    more: int | None = None
    more_least: int | None = None
    more_most: int | None = None
    more_found: int | None = None
    bootstrap: tuple[float, float] | None = None

    @property
    def sentence(self) -> str:
        """What the verdict says."""
        found = self.interval
        if found is None:
            return "no seed in common with the baseline"
        if self.kind == "none" or found.half is None:
            return f"{found.mean:+.4f} with one seed: no verdict"
        if self.kind in ("better", "worse"):
            small = f", less than the {self.effect:g} asked for" if abs(found.mean) + found.half <= self.effect else ""
            return f"{self.kind} by {abs(found.mean):.4f} ± {found.half:.4f} ({_p(self.p_holm)}){small}"
        if self.kind == "same":
            return f"no difference beyond ± {_up(self.bound or 0.0)}"
        least = f"{self.more_least:,}" if self.more_least is not None else "over 1,000"
        between = f"{least} to {self.more_most:,}" if self.more_most is not None else f"{least} to over 1,000"
        about = f"about {self.more:,} more seed{'s' * (self.more != 1)} ({between})" if self.more is not None else "over 1,000 more seeds"
        larger = self.more_found is not None and self.more_found != self.more
        other = f", one of {abs(found.mean):.2g} as found about {self.more_found:,}" if larger else ""
        alone = f" ({_p(self.p)} alone, {_p(self.p_holm)} among the arms)" if self.p is not None and self.p < LEVEL else ""
        return f"undecided{alone}: a difference of {self.effect:.2g} takes {about}{other}"


def _up(value: float) -> str:
    """Rounded up: a bound must hold."""
    return f"{math.ceil(value * 1e4 - 1e-6) / 1e4:.4f}"


def _p(p: float | None) -> str:
    return "p ?" if p is None else f"p {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def judge(losses: Mapping[str, Losses], base: str, *, effect: float = EFFECT, looks: Sequence[int] = ()) -> dict[str, Verdict]:
    """The verdict on every arm but the base.

    Under PAIRED_FROM seeds by the block model, from there on by each arm's own paired differences. `looks`: the numbers of seeds at
    which a sequential study was to be looked at, fixed beforehand; then by paired differences alone, of the seeds up to the last look
    that was reached, corrected for all the looks.
    """
    level = repeated_level(looks) if looks else LEVEL
    estimates = _sequential(losses, base, looks) if looks else {n: (e, e.p) for n, e in _estimates(losses, base).items()}
    alone = {name: p for name, (_, p) in estimates.items() if p is not None}
    corrected = holm(alone)
    undecided = sum(p >= LEVEL for p in corrected.values())
    found: dict[str, Verdict] = {}
    for name in (n for n in losses if n != base):
        made = estimates[name][0] if name in estimates else None
        if made is None or name not in corrected:
            found[name] = Verdict("none", made.interval() if made else None, made.method if made else "", effect=effect)
            continue
        verdict = _verdict(made, alone[name], corrected[name], effect, level, undecided)
        common = sorted(losses[name].keys() & losses[base].keys())
        if len(common) >= BOOTSTRAP_FROM and not looks:
            verdict = replace(verdict, bootstrap=bootstrap([losses[name][s] - losses[base][s] for s in common]))
        found[name] = verdict
    return found


def _sequential(losses: Mapping[str, Losses], base: str, looks: Sequence[int]) -> dict[str, tuple[Estimate, float | None]]:
    """At the last look that was reached, with the smallest p of the looks up to there, corrected for the whole plan of them."""
    found: dict[str, tuple[Estimate, float | None]] = {}
    for name in (n for n in losses if n != base):
        common = sorted(losses[name].keys() & losses[base].keys())
        reached = [n for n in looks if n <= len(common)]
        made = [e for n in reached or [len(common)] if (e := paired({s: losses[name][s] for s in common[:n]}, losses[base])) is not None]
        smallest = min((e.p for e in made if e.p is not None), default=None)
        if made:
            found[name] = (
                replace(made[-1], method="sequential t"),
                repeated_p(smallest, looks) if reached and smallest is not None else None,
            )
    return found


def _estimates(losses: Mapping[str, Losses], base: str) -> dict[str, Estimate]:
    by_pairs = {name: made for name in losses if name != base and (made := paired(losses[name], losses[base])) is not None}
    few = [name for name, made in by_pairs.items() if made.n < PAIRED_FROM]
    return by_pairs | _pooled({name: losses[name] for name in (base, *few)}, base)


def _pooled(losses: Mapping[str, Losses], base: str) -> dict[str, Estimate]:
    """By the block model; but an arm whose differences spread otherwise than those of the others keeps out of their residual."""
    together = {name: values for name, values in losses.items() if name != base}
    while len(together) > 1:
        odd = {name: p for name in together if (p := _oddness(name, together, losses[base], base)) is not None}
        name = min(odd, key=lambda n: odd[n]) if odd else None
        if name is None or odd[name] >= 1:
            return blocked({base: losses[base], **together}, base)
        del together[name]
    return {}  # the paired estimate is the same


def _oddness(name: str, together: Mapping[str, Losses], base_losses: Losses, base: str) -> float | None:
    """p of an arm's spread over the p at which it is left out: below 1 it is; None where nothing is known of it."""
    own = paired(together[name], base_losses)
    rest = blocked({base: base_losses, **{n: v for n, v in together.items() if n != name}}, base)
    other = next(iter(rest.values()), None)
    if own is None or other is None or own.error is None:
        return None
    if not other.variance or not own.variance:
        return 1.0 if own.variance == other.variance else 0.0
    wider, quieter = variance_ratio_tails(own.variance / other.variance, own.df, other.df)
    return min(wider / WIDER, quieter / QUIETER)


def _verdict(made: Estimate, p: float, p_holm: float, effect: float, level: float, undecided: int) -> Verdict:
    interval = made.interval(level)
    assert interval.half is not None
    known = Verdict("undecided", interval, made.method, p, p_holm, effect)
    if p_holm < LEVEL:
        return replace(known, kind="better" if interval.mean < 0 else "worse")
    furthest = abs(interval.mean) + interval.half
    if furthest <= effect:
        return replace(known, kind="same", bound=furthest)

    def df(n: int) -> int:  # of so many seeds; the block model's grow with the arms
        return n - 1 if n >= PAIRED_FROM or made.method != "block model" else max(1, made.df * (n - 1) // (made.n - 1))

    def seeds(size: float, variance: float) -> int | None:
        n = seeds_for(size, variance, df, level / max(1, undecided))
        return None if n is None else max(1, n - made.n)

    bounds = variance_bounds(made.variance, made.df)
    about, least, most = (seeds(effect, variance) for variance in bounds)
    # Of a few seeds a difference looks larger than it is, so that the smallest worth knowing is what a study is planned by.
    as_found = seeds(abs(interval.mean), bounds[0]) if abs(interval.mean) > effect else None
    return replace(known, more=about, more_least=least, more_most=most, more_found=as_found)
