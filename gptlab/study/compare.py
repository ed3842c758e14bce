"""Comparing the arms of a study: each against the baseline, on paired seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest
from gptlab.config.slots import word
from gptlab.runner.reference import METRIC as METRIC
from gptlab.runner.run import PARENT, Run, all_runs, find_study, members, read_ablation
from gptlab.study.scores import Estimate, of_runs
from gptlab.study.statistics import Interval, deviation, mean_interval, p_at_most
from gptlab.study.text import TextInterval, text_interval
from gptlab.study.verdict import EFFECT, Verdict, judge
from gptlab.study.votes import Tally, tally

NAMED = 4  # arms in one note
SAME_WEIGHTS = 0.995  # the share of initial weights from which two arms begin alike
ACCURACY, SOLVED, PER_BYTE = "val/accuracy", "val/solved", "val/bits_per_byte"


@dataclass
class Arm:
    """The runs of one config, one a seed."""

    key: str
    label: str
    settings: dict[str, str]
    runs: dict[int, Run] = field(default_factory=dict)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)  # of the command line that made its runs; none of those made otherwise
    open: dict[int, Run] = field(default_factory=dict)  # the runs that are not done

    def mean(self, name: str) -> float | None:
        values = [float(s[name]) for s in self.summaries.values() if name in s]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    label: str
    settings: dict[str, str]
    baseline: bool
    seeds: list[int]
    loss: Interval
    verdict: Verdict | None  # against the baseline, on the seeds both have; None of the baseline
    text: TextInterval | None  # of the difference, over the documents of the held-out set
    pairing_gain: float | None  # unpaired over paired standard deviation of the difference
    parameters: int
    steps: float
    tokens: float
    flops: float
    seconds: float
    tokens_per_second: float
    peak_memory: float
    p_target: float | None  # one-sided, that the mean loss is above the comparison's target
    extra: dict[str, float]  # whatever else was measured at the end, mean of the seeds
    scores: dict[str, Estimate] = field(default_factory=dict)  # benchmarks and probes

    @property
    def difference(self) -> Interval | None:
        """Of the mean loss, with its 95 % interval."""
        return self.verdict.interval if self.verdict else None


@dataclass(frozen=True)
class Comparison:
    """A study's table: what was measured, the verdict on each arm, and what stands in the way of comparing it."""

    study: str
    metric: str
    rows: list[Row]
    notes: list[str]
    target: float | None = None  # a loss to be reached, as a speed run has one
    votes: list[Tally] = field(default_factory=list)  # of blind pairs

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(r) | {"verdict_text": r.verdict.sentence if r.verdict else None, "difference": r.difference and asdict(r.difference)}
                for r in self.rows]  # fmt: skip
        told = {"version": 2, "study": self.study, "metric": self.metric, "target": self.target, "rows": rows, "notes": self.notes}
        return told | {"votes": [asdict(t) | {"votes": t.votes, "sentence": t.sentence} for t in self.votes]}


def collect(study: str) -> tuple[list[Arm], list[str]]:
    """The study's arms with their finished runs, in the order they were asked for, and notes on what was left out."""
    found, notes = gather(study)
    return [a for a in found if a.runs], notes


def gather(study: str) -> tuple[list[Arm], list[str]]:
    """As `collect`, with the arms of which no run is finished."""
    study = find_study(study)
    by_identity = {r.identity: r for r in all_runs()}
    arms: dict[str, Arm] = {}
    left_out: dict[str, list[Arm]] = defaultdict(list)
    for member in members(study):
        run = by_identity.get(member["identity"])
        settings = {k: v for k, v in member["settings"].items() if not _is_seed(k)}
        arm = arms.setdefault(member["arm"], Arm(member["arm"], "", settings))
        arm.overrides = member.get("overrides") or arm.overrides
        arm.label = member.get("label") or arm.label  # as it is called now, whatever it was called before
        done = run.read("done.json") if run else None
        if run is None or done is None:
            left_out[run.state if run else "removed"].append(arm)
            if run is not None:
                arm.open[int(member["seed"])] = run
            continue
        if not math.isfinite(float(done["summary"].get(METRIC, 0.0))):
            left_out["diverged"].append(arm)
            continue
        arm.runs[int(member["seed"])] = run
        arm.summaries[int(member["seed"])] = done["summary"]
    found = list(arms.values())
    _label(found)
    return found, [_left_out(state, of) for state, of in left_out.items()]


def _left_out(state: str, arms: list[Arm]) -> str:
    labels = list(dict.fromkeys(arm.label for arm in arms))
    some = ", ".join(labels[:NAMED]) + (", …" if len(labels) > NAMED else "")
    return f"{len(arms)} run{'s' if len(arms) > 1 else ''} left out: {state} ({some})"


def _is_seed(key: str) -> bool:
    return key == "seed" or key.startswith("seeds.")


def _label(arms: list[Arm]) -> None:
    """Name each arm by what its settings do not share with every other arm; one without any is the base."""
    shared = set.intersection(*(set(a.settings.items()) for a in arms)) if arms else set()
    unnamed = [a for a in arms if not a.label]
    for arm in unnamed:
        arm.label = " ".join(word(k, v) for k, v in arm.settings.items() if (k, v) not in shared).strip() or "base"
    labels = [a.label for a in arms]
    for arm in unnamed:  # `none` for a gate and `none` for a value
        if labels.count(arm.label) > 1 and arm.label != "base":
            arm.label = " ".join(f"{k.rpartition('/')[2]}={v}" for k, v in arm.settings.items() if (k, v) not in shared)
    labels = [a.label for a in arms]
    for arm in arms:
        if labels.count(arm.label) > 1:
            arm.label = f"{arm.label} ({arm.key[:4]})"


def compare(study: str, *, baseline: str | None = None, target: float | None = None, effect: float | None = None) -> Comparison:
    """Compare a study's arms on the held-out loss of their last step. The baseline is the first arm unless one is named.

    With a `target`, each arm is also tested on whether its mean over the seeds is at most that. `effect`: the smallest difference worth
    knowing; unless given, what the study was launched with.

    Raises ConfigError when the study is unknown or has no finished run, the baseline is not an arm, or the arms were not
    measured on the same text. Arms with different tokenisers are compared in bits per byte, of the whole held-out set.
    """
    arms, notes = collect(study)
    if not arms:
        raise ConfigError(f"study {study!r} has no finished run yet" + (f" ({'; '.join(notes)})" if notes else ""))
    told = read_ablation(study)
    if effect is not None and not effect > 0:
        raise ConfigError(f"--effect {effect:g} must be above 0: it is the smallest difference of {METRIC} worth knowing")
    base = base_of(study, arms, baseline)
    metric, remarks = _comparable(arms)
    notes += remarks + _starts(told, base) + _looked(told, max(len(a.runs) for a in arms))
    ordered = [base, *(a for a in arms if a is not base)]
    losses = {a.key: {seed: float(s[metric]) for seed, s in a.summaries.items() if metric in s} for a in ordered}
    verdicts = judge(losses, base.key, effect=effect or float(told.get("effect", EFFECT)), looks=told.get("looks", ()))
    rows = [_row(a, base, losses, verdicts.get(a.key), target, metric) for a in ordered]
    votes = tally(study, {run.identity: a.label for a in ordered for run in (*a.runs.values(), *a.open.values())})
    return Comparison(study, metric, rows, notes, target, votes)


def _looked(told: dict[str, Any], seeds: int) -> list[str]:
    """What looking at a study more than once does to its verdicts."""
    looks, asked = told.get("looks", []), [n for n in told.get("seeds", []) if 1 < n <= seeds]
    if looks:
        made, all_ = ", ".join(str(n) for n in looks if n <= seeds), ", ".join(map(str, looks))
        if not made:
            return [f"looks are planned after {all_} seeds"]
        planned = "as was planned beforehand" if made == all_ else f"of the looks planned beforehand (after {all_})"
        beyond = "; seeds beyond the last look are not used" if seeds > looks[-1] else ""
        return [f"looked at after {made} seeds, {planned}{beyond}"]
    if len(asked) > 1:
        early = ", ".join(map(str, asked[:-1]))
        return [
            f"seeds were added after a look at {early}: 5 % false holds for one look; --until-decided plans several and corrects for them"
        ]
    return []


def _starts(told: dict[str, Any], base: Arm) -> list[str]:
    """Which arms begin with other weights than the baseline of their seed, as far as `gptlab ablate` has looked."""
    planned = {label: p["same_weights"] for label, p in told.get("planned", {}).items() if label != base.label}
    other = {label: share for label, share in planned.items() if share is not None and share < SAME_WEIGHTS}
    return [f"{label} shares {share:.0%} of the baseline's initial weights" for label, share in other.items()]


def base_of(study: str, arms: list[Arm], named: str | None = None) -> Arm:
    """The arm that the others are compared with: the one named here, else the one the study was launched with, else the first.

    Raises ConfigError where the named one is none of the arms.
    """
    launched = read_ablation(study).get("baseline")
    named = named or (launched if any(a.label == launched for a in arms) else None)
    if named is None:
        return arms[0]
    for arm in arms:
        if named in (arm.label, arm.label.replace(" ", ","), arm.key):
            return arm
    labels = [a.label for a in arms]
    raise ConfigError(f"--baseline {named!r} is not an arm{suggest(named, labels)}; there are: {'; '.join(labels)}")


def _row(arm: Arm, base: Arm, measured: dict[str, dict[int, float]], verdict: Verdict | None, target: float | None, metric: str) -> Row:
    losses, base_losses = measured[arm.key], measured[base.key]
    paired = sorted(losses.keys() & base_losses.keys())
    differences = [losses[s] - base_losses[s] for s in paired]
    gain = None
    if arm is not base and len(paired) > 1 and deviation(differences) > 0:
        unpaired = (deviation([losses[s] for s in paired]) ** 2 + deviation([base_losses[s] for s in paired]) ** 2) ** 0.5
        gain = unpaired / deviation(differences)
    return Row(
        label=arm.label,
        settings=arm.settings,
        baseline=arm is base,
        seeds=sorted(arm.runs),
        loss=mean_interval(list(losses.values())),
        verdict=verdict,
        text=text_interval(arm.runs, base.runs) if arm is not base and metric == METRIC else None,
        pairing_gain=gain,
        parameters=int(arm.mean("parameters") or 0),
        steps=arm.mean("step") or 0.0,
        tokens=arm.mean("tokens") or 0.0,
        flops=arm.mean("flops") or 0.0,
        seconds=arm.mean("seconds") or 0.0,
        tokens_per_second=arm.mean("train/tokens_per_second") or 0.0,
        peak_memory=arm.mean("memory/peak_bytes") or 0.0,
        p_target=p_at_most(list(losses.values()), target) if target is not None else None,
        extra={name: value for name in _extra_names(arm) if (value := arm.mean(name)) is not None},
        scores=of_runs(arm.runs.values()),
    )


def _extra_names(arm: Arm) -> list[str]:
    standard = ("train/", "memory/", "data/", "machine/", "eval/")  # the last stand among the scores
    told = (METRIC, PER_BYTE)  # the second is the first in another unit
    names = {n for s in arm.summaries.values() for n in s if "/" in n and n not in told and not n.startswith(standard)}
    return sorted(names)


def tokenizers(arms: Sequence[Arm]) -> set[str]:
    """The hashes of the tokenisers of all runs: with several, losses a token say nothing of one another."""
    manifests = [(run.read("data.json") or {}).get("manifest", {}) for arm in arms for run in arm.runs.values()]
    return {str(manifest.get("tokenizer", {}).get("sha256")) for manifest in manifests}


def _comparable(arms: list[Arm]) -> tuple[str, list[str]]:
    """The metric to compare, and notes on what else differs. Raises ConfigError when the losses are not of the same text."""
    notes: list[str] = []
    measured: dict[str, str] = {}
    texts: set[str | None] = set()
    facts: dict[str, set[str]] = defaultdict(set)
    for arm in arms:
        for run in arm.runs.values():
            data, environment = run.read("data.json") or {}, run.read("environment.json") or {}
            tokens = f"{data.get('manifest', {}).get('tokenizer', {}).get('sha256')} {data.get('held_out', {}).get('val')}"
            measured.setdefault(tokens, arm.label)
            texts.add(data.get("held_out_text"))
            facts["gptlab sources"].add(str(environment.get("source")))
            facts["torch"].add(str(environment.get("packages", {}).get("torch")))
            hardware = environment.get("hardware", {})
            facts["hardware"].add(f"{hardware.get('gpu') or hardware.get('cpu')} {hardware.get('device')}")
    limits = {arm.label: _setting(arm, "data", "validation_tokens") for arm in arms}
    if len(set(limits.values())) > 1:
        told = "; ".join(f"{label}: {limit or 'all'}" for label, limit in limits.items())
        stages = any(run.read(PARENT) for arm in arms for run in arm.runs.values())
        also = ". Runs that begin with one another are stages, which `gptlab runs lineage RUN` shows" if stages else ""
        raise ConfigError(f"the arms were measured on different numbers of tokens (data.validation_tokens: {told}); use one for all{also}")
    metric = METRIC
    if len(measured) > 1:
        names = " and ".join(repr(a) for a in measured.values())
        refused = f"the arms {names} were measured on different validation tokens: their losses cannot be compared"
        if len(texts) > 1 or None in texts:
            raise ConfigError(refused)
        if any(limits.values()):
            raise ConfigError(f"{refused}, nor their bits per byte: windows of different text; data.validation_tokens=0 measures all of it")
        metric = PER_BYTE
        notes.append(f"{names} have different tokenisers and the same held-out text, all of it measured: compared in bits per byte")
    for what, values in facts.items():
        if len(values) > 1:
            notes.append(f"mixed {what}: {', '.join(sorted(values))}")
    contexts = {arm.label: _setting(arm, "model", "context_length") for arm in arms}
    if len(set(contexts.values())) > 1:
        notes.append(f"different context lengths ({contexts}): a longer one sees more before each token it is scored on")
    formats = {arm.label: _setting(arm, "hardware", "precision") for arm in arms}
    if len(set(formats.values())) > 1:
        told = "; ".join(f"{label}: {name}" for label, name in formats.items())
        notes.append(f"the arms were trained in different number formats ({told}); hardware.precision=fp32 is one for all")
    if len({arm.mean("step") for arm in arms}) > 1:
        notes.append("the arms ended at different steps: a difference between two of them is of their length, too")
    counts = {len(arm.runs) for arm in arms}
    if len(counts) > 1:
        notes.append("the arms have different numbers of seeds; differences use the seeds both have")
    if max(counts) == 1:
        notes.append("one seed only: the differences have no interval")
    return metric, notes


def _setting(arm: Arm, part: str, name: str) -> Any:
    """A plain value of the arm's config, read as JSON: comparing must not import a model. Raises ConfigError for a file that is none."""
    run = next(iter(arm.runs.values()))
    config = (run.read("config.json") or {}).get("config")
    if config is None:
        raise ConfigError(f"{run.directory / 'config.json'} cannot be read; the run's own command writes it again, and trains nothing")
    return config.get(part, {}).get(name)
