"""`gptlab compare STUDY --pairing`: a gain for every reading of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.config.compose import settings
from gptlab.config.errors import ConfigError
from gptlab.runner.run import all_runs
from gptlab.study.pairing import markdown, pairing
from tests.cli.conftest import Command
from tests.tiny import tiny


def test_every_reading_of_a_study_has_a_gain(corpus_file: Path, gptlab: Command) -> None:
    for seed in range(4):
        for norm in ("layernorm", "rmsnorm"):
            own = [f"model/norm={norm}", f"seed={seed}"]
            run = tiny(corpus_file, "study=p", "callbacks.evaluation.every=2", *own, steps=6)
            train(compose(run), settings=settings(own))
    found = pairing("p")
    assert [(g.step, g.seeds) for g in found] == [(2, 4), (4, 4), (6, 4)]
    assert "| step 2 | step 4 | step 6 |" in markdown(found)
    shown = gptlab("compare", "p", "--pairing")
    assert "pairing by seed, 4 seeds: unpaired over paired spread" in shown.out
    told = json.loads(gptlab("compare", "p", "--pairing", "--json").out)["pairing"]
    assert [g["step"] for g in told] == [2, 4, 6]
    assert told[-1]["gain"] == pytest.approx(json.loads(gptlab("compare", "p", "--json").out)["rows"][1]["pairing_gain"])
    done = next(r for r in all_runs() if "seed=3" in r.name)
    (done.directory / "done.json").unlink()
    with pytest.raises(ConfigError, match=r"--pairing needs at least 4 seeds that .* both have: 3"):
        pairing("p")
    assert gptlab("compare", "p", "--pairing").code == 2


def test_power_is_told_of_studies_with_many_seeds(corpus_file: Path, gptlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        for norm in ("layernorm", "rmsnorm"):
            own = [f"model/norm={norm}", f"seed={seed}"]
            train(compose(tiny(corpus_file, "study=p", *own, steps=2)), settings=settings(own))
    refused = gptlab("compare", "p", "--power")
    assert (refused.code, refused.out) == (2, "")
    assert "--power needs at least 12 seeds that 'rmsnorm' and 'layernorm' both have: 4" in " ".join(refused.err.split())
    monkeypatch.setattr("gptlab.study.power.FEWEST_SEEDS", 4)
    monkeypatch.setattr("gptlab.study.power.PILOT", 3)
    told = json.loads(gptlab("compare", "p", "--power", "--effect", "0.5", "--json").out)["power"]
    assert [(p["label"], p["effect"], p["seeds"]) for p in told] == [("rmsnorm", 0.5, 4)]
    assert "power: a true difference of 0.5" in gptlab("compare", "p", "--power", "--effect", "0.5", "--markdown").out


def test_json_has_no_infinity(corpus_file: Path, gptlab: Command) -> None:
    """Arms that are equal in every seed gain without bound, which JSON cannot say."""
    for seed in range(4):
        for effort in ("naive", "sdpa"):
            own = [f"model/kernel={effort}", f"seed={seed}", "optimizer.learning_rate=0"]
            train(compose(tiny(corpus_file, "study=e", "model.init.std=0", *own, steps=2)), settings=settings(own))
    out = gptlab("compare", "e", "--pairing", "--json").out
    told = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["pairing"]
    assert told
    assert {gain["gain"] for gain in told} == {None}
