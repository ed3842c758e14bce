"""Reference curves: is this run's loss normal? Published losses of a known setting, beside the run's own, with a band around them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of, register, suggest
from gptlab.runner.callback import Callback
from gptlab.tracker.console import say
from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

METRIC, RECORDED, FILE = "val/loss", "reference/loss", "reference.json"
SAME_HORIZON = 0.05  # lengths that differ by less have the same schedule
WIDER = 2.0  # times the band, where the learning rate falls over another length than it did there


class ReferenceWarning(UserWarning):
    """A run's loss has left the band of its reference."""


@dataclass(frozen=True)
class Reference:
    """Published losses of one setting, in nats a token, and how far from them a run of it may be.

    points  (step, held-out loss), at steps of `batch_tokens` tokens, of a run planned for `steps` steps
    mark    instead of points: a loss that the lowest measurement of a whole run is held against
    above, below  the band, in nats
    """

    name: str
    setting: str
    source: str
    date: str
    corpus: str
    tokenizer: str
    vocabulary: int
    context_length: int
    batch_tokens: int
    steps: int
    above: float
    below: float
    points: tuple[tuple[int, float], ...] = ()
    mark: float | None = None

    @property
    def tokens(self) -> int:
        """What its whole run was planned for."""
        return self.steps * self.batch_tokens

    def at(self, tokens: float) -> float | None:
        """The loss after so many training tokens, linear in their logarithm between two points, None outside of them; or the mark."""
        if self.mark is not None:
            return self.mark
        known = [(step * self.batch_tokens, loss) for step, loss in self.points]
        for (before, high), (after, low) in zip(known, known[1:] or known, strict=False):
            if before <= tokens <= after:
                share = math.log(tokens / before) / math.log(after / before) if after > before else 0.0
                return high + share * (low - high)
        return None

    def band(self, factor: float = 1.0) -> str:
        """The band as text: `± 0.1`, or `+0.1 and -0.3`."""
        above, below = self.above * factor, self.below * factor
        return f"± {above:g}" if above == below else f"+{above:g} and -{below:g}"


def folder() -> Path:
    """Where the curves that come with gptlab lie."""
    from gptlab.config.sources import config_dir

    return config_dir() / "reference"


def known() -> list[str]:
    """The names of the curves that come with gptlab."""
    return sorted(file.stem for file in folder().glob("*.json"))


def load(curve: str) -> Reference:
    """The curve of a name, or of a JSON file of one's own. Raises ConfigError when there is none, or it is not one."""
    names = known()
    file = Path(curve) if curve.endswith(".json") else folder() / f"{curve}.json"
    if curve not in names and not (curve.endswith(".json") and file.is_file()):
        raise ConfigError(f"callbacks.reference.curve={curve}: no such curve{suggest(curve, names)}; there are {', '.join(names)}")
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        points = tuple((int(step), float(loss)) for step, loss in data.pop("points", ()))
        found = Reference(name=file.stem, points=points, **data)
        steps = [step for step, _ in points]
        numbers = (found.above, found.below, *(loss for _, loss in points), *([] if found.mark is None else [found.mark]))
        if (found.mark is None) != bool(points) or steps != sorted(set(steps)) or min(*numbers, *steps, 1) <= 0:
            raise ValueError("points of rising steps and positive losses or a mark are needed, and a band above and below")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"callbacks.reference.curve={curve}: {file} cannot be read as a reference curve ({error})") from error
    return found


@register("callback", "reference")
class ReferenceCurve(Callback):
    """Published losses beside the run's own: `reference/loss` at each evaluation, and one warning when val/loss leaves their band.

    curve     a name of conf/reference, or a JSON file of one's own in the same form
    mismatch  where the run has another text, tokeniser or context than the curve: refuse it, leave the curve out, or compare all the same
    """

    def __init__(self, *, curve: str, mismatch: Literal["refuse", "leave", "compare"] = "refuse") -> None:
        self.reference, self.mismatch = load(curve), mismatch

    def on_start(self, trainer: Trainer) -> None:
        reference, self._warned = self.reference, False
        before = (float(line[METRIC]) for line in trainer.run.metrics() if METRIC in line)  # of earlier sessions
        self._lowest = min(before, default=math.inf)
        planned = trainer.total_steps * trainer.batch_tokens
        self._same_length = abs(planned / reference.tokens - 1) <= SAME_HORIZON
        self._factor = 1.0 if self._same_length else WIDER
        differences = _differences(reference, trainer)
        self._judges = not differences or self.mismatch == "compare"
        if differences and self.mismatch == "refuse":
            raise ConfigError(
                f"callbacks.reference.curve={reference.name} was measured in another setting ({'; '.join(differences)}): choose another of "
                f"{', '.join(known())}, or callbacks.reference.mismatch=leave or compare"
            )
        if not trainer.world.first:
            return
        if differences:
            say((f"  not comparable with {reference.name}: {'; '.join(differences)}", "yellow" if self._judges else "dim"))
        (trainer.run.directory / FILE).unlink(missing_ok=True)
        if self._judges:
            say((f"  reference {self._describe()}", "dim"))
            kept = asdict(reference) | {"above": reference.above * self._factor, "below": reference.below * self._factor}
            trainer.run.write(FILE, kept)

    def on_record(self, trainer: Trainer, metrics: Metrics) -> None:
        """Beside each held-out loss the published one, and a warning the first time they are too far apart."""
        if not self._judges or METRIC not in metrics:
            return
        loss, state = float(metrics[METRIC]), trainer.state
        self._lowest = min(self._lowest, loss)
        expected = self.reference.at(state.tokens)
        if expected is not None:
            metrics[RECORDED] = expected
            if self.reference.mark is None and not self._inside(loss - expected):
                self._warn(trainer, f"step {state.step:,}: {METRIC} {loss:.3f}", loss - expected, expected)

    def on_end(self, trainer: Trainer) -> None:
        """How the run's end stands to the reference; it was measured before, since evaluation is the first of the callbacks."""
        if not self._judges or not trainer.world.first:
            return
        reference, state, marked = self.reference, trainer.state, self.reference.mark is not None
        step, last = trainer.measured_on_held_out
        loss, expected = self._lowest if marked else last, reference.at(state.tokens)
        if not math.isfinite(loss) or (step != state.step and not marked):
            return
        told = f"{'lowest ' if marked else ''}val {loss:.4f}"
        if expected is None:
            here, spans = state.tokens / reference.batch_tokens, [f"{point[0]:,}" for point in (reference.points[0], reference.points[-1])]
            text = f"{told}: {reference.name} has no loss for step {here:,.0f}, only for {' to '.join(spans)}"
        elif marked and not self._same_length:
            text = f"{told}: not judged, since {reference.name}'s {expected:.5g} took {reference.steps:,} steps"
        elif self._inside(loss - expected):
            text = f"{told}: {_apart(loss - expected)} {reference.name}'s {expected:.5g}, inside its band of {self._band()}"
        elif self._warned:
            text = f"{told}: {_apart(loss - expected)} {reference.name}'s {expected:.5g}, outside its band of {self._band()}"
        else:
            self._warn(trainer, f"{'lowest ' if marked else ''}{METRIC} {loss:.3f}", loss - expected, expected)
            return
        say((f"  {text}", "dim"))

    def _inside(self, difference: float) -> bool:
        return -self.reference.below * self._factor <= difference <= self.reference.above * self._factor

    def _band(self) -> str:
        return self.reference.band(self._factor) + ("" if self._same_length else ", doubled for another length")

    def _warn(self, trainer: Trainer, what: str, difference: float, expected: float) -> None:
        """Once a session: what is above the band at one evaluation mostly is at the next."""
        if self._warned or not trainer.world.first:
            return
        self._warned = True
        reference = self.reference
        text = f"{what} is {_apart(difference)} {reference.name}'s {expected:.5g}, outside its band of {self._band()} ({reference.source})"
        say((text, "yellow"))
        warnings.warn(text, ReferenceWarning, stacklevel=2)

    def _describe(self) -> str:
        reference = self.reference
        length = f"{reference.steps:,} steps of {reference.batch_tokens:,} tokens"
        if reference.mark is not None:
            judged = self._band() if self._same_length else "not judged, since this run has another length"
            return f"{reference.name}: {reference.mark:g} within {length}, {judged}; {reference.source}"
        (first, high), (last, low) = reference.points[0], reference.points[-1]
        there = "" if self._same_length else f" than its {length}"
        return f"{reference.name}: {high:g} at step {first:,} to {low:g} at step {last:,}, {self._band()}{there}; {reference.source}"


def _differences(reference: Reference, trainer: Trainer) -> list[str]:
    """What of a run's text, tokens and context is not the reference's: losses of these cannot be compared."""
    corpus: Any = trainer.config.data.corpus
    here: Sequence[tuple[str, object, object]] = (
        ("the text", reference.corpus, getattr(corpus, "dataset", component_of(corpus).name)),
        ("data/tokenizer", reference.tokenizer, trainer.data.tokenizer.name),
        ("its vocabulary", reference.vocabulary, trainer.data.vocabulary),
        ("model.context_length", reference.context_length, trainer.config.model.context_length),
    )
    return [f"{what} is {there} there and {own} here" for what, there, own in here if there != own]


def _apart(difference: float) -> str:
    return f"{abs(difference):.3f} {'above' if difference > 0 else 'below'}"
