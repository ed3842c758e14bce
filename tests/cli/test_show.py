"""`gptlab components`, `compare` and `sample`, and how a run is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.config.registry import components, load_components
from gptlab.runner.run import find_run
from tests.cli.conftest import Command
from tests.cli.test_train import PLUGIN
from tests.tiny import tiny


@pytest.fixture
def identity(gptlab: Command, corpus_file: Path) -> str:
    assert gptlab("train", *tiny(corpus_file, "study=shown", steps=4)).code == 0
    return next((Path(os.environ["GPTLAB_RUNS"]) / "shown").glob("*/done.json")).parent.name.rpartition("-")[2]


def test_every_component_is_listed_with_its_options(gptlab: Command) -> None:
    listed = gptlab("components").out
    load_components()
    for component in components():
        if not component.outside:
            assert component.name in listed
            assert component.summary.split(":")[0] in listed, component.name
    assert "eps=1e-06" in listed
    assert "qk_norm (Queries and keys" in listed
    assert "rmsnorm" in gptlab("components", "--slot", "model/norm").out
    assert "did you mean model/norm?" in gptlab("components", "--slot", "model/nrm").err


def test_the_contract_is_checked_on_a_users_component(gptlab: Command, tmp_path: Path) -> None:
    good = tmp_path / "checked_norm.py"
    good.write_text(PLUGIN.replace("maxnorm", "checkednorm"))
    passed = gptlab("components", "check", str(good))
    assert passed.code == 0, passed.out + passed.err
    assert "every check passed" in passed.out
    bad = tmp_path / "leaking_norm.py"
    leak = "return self.gain * x / (x.abs().amax((-2, -1), keepdim=True) + self.eps)"  # looks at later tokens
    bad.write_text(
        PLUGIN.replace("maxnorm", "leakingnorm").replace("return self.gain * x / (x.abs().amax(-1, keepdim=True) + self.eps)", leak)
    )
    failed = gptlab("components", "check", str(bad))
    assert failed.code == 1
    assert "✗" in failed.out
    assert "causal" in failed.out


def test_a_deleted_config_is_written_again(gptlab: Command, identity: str, corpus_file: Path) -> None:
    next(Path(os.environ["GPTLAB_RUNS"]).glob(f"*/*{identity}/config.json")).unlink()
    assert gptlab("sample", identity).code == 2
    assert "skipped" in gptlab("train", *tiny(corpus_file, "study=shown", steps=4)).out
    assert gptlab("sample", identity).code == 0


def test_a_run_is_found_by_directory_identity_prefix_and_latest(gptlab: Command, identity: str, corpus_file: Path) -> None:
    directory = next(Path(os.environ["GPTLAB_RUNS"]).glob(f"*/*{identity}"))
    texts = {gptlab("sample", reference, "--max-tokens", "8").out for reference in (str(directory), identity, identity[:5], "latest")}
    assert len(texts) == 1
    gptlab("train", *tiny(corpus_file, "study=shown", "seed=1", steps=4))
    several = gptlab("sample", "shown/")
    assert several.code == 2
    assert "matches 2 runs" in several.err
    gptlab("train", *tiny(corpus_file, "study=shown", "seed=2", "name=sae2", steps=4))
    assert gptlab("sample", "shown/sae", "--max-tokens", "2").code == 0
    gptlab("train", *tiny(corpus_file, "study=shown", "seed=3", "name=sae", steps=4))
    for whole in ("shown/sae", "sae"):
        assert find_run(whole).name == "sae", "a whole name goes before a longer one"
    damaged = next(Path(os.environ["GPTLAB_RUNS"]).glob("shown/sae2-*"))
    (damaged / "config.json").write_text("")
    assert f"{damaged / 'config.json'} cannot be read" in gptlab("sample", str(damaged)).err
    assert "no run matches" in gptlab("sample", "zzzz").err


def test_samples_are_seeded_and_settings_checked(gptlab: Command, identity: str) -> None:
    same = [gptlab("sample", identity, "--prompt", "The", "--seed", "1", "--max-tokens", "30").out for _ in range(2)]
    assert same[0] == same[1]
    assert same[0].startswith("The")
    assert gptlab("sample", identity, "--prompt", "The", "--seed", "2", "--max-tokens", "30").out != same[0]
    greedy = {gptlab("sample", identity, "--temperature", "0", "--seed", s, "--max-tokens", "30").out for s in "12"}
    assert len(greedy) == 1
    for arguments, said in (
        (("--prompt", "é"), "'é' at place 1"),
        (("--prompt", ""), "prompt is empty"),
        (("--temperature", "-1"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
        (("--top-k", "-1"), "--top-k"),
        (("--max-tokens", "0"), "--max-tokens"),
    ):
        result = gptlab("sample", identity, *arguments)
        assert result.code == 2
        assert said in result.err


def test_compare_prints_json_and_markdown(gptlab: Command, identity: str, tmp_path: Path) -> None:
    assert json.loads(gptlab("compare", "shown", "--json").out)["rows"][0]["baseline"] is True
    assert gptlab("compare", "shown", "--markdown").out.startswith("| arm |")
    assert gptlab("compare", "shown", "--png", str(tmp_path / "c.png")).code == 0
    assert (tmp_path / "c.png").exists()
    for more in (("--png", str(tmp_path / "c.xyz")), ("--png", str(tmp_path / "c.png"), "--metric", "val/los")):
        refused = gptlab("compare", "shown", *more)
        assert refused.code == 2
        assert more[-1].rpartition(".")[2] in refused.err
        assert not refused.out, "before the table, and not behind it"


def test_a_run_of_an_unregistered_component_says_which(gptlab: Command, identity: str) -> None:
    file = next(Path(os.environ["GPTLAB_RUNS"]).glob(f"*/*{identity}/config.json"))
    file.write_text(file.read_text().replace('"layernorm"', '"theirnorm"'))
    result = gptlab("sample", identity)
    assert result.code == 2
    assert "model/norm=theirnorm is not registered" in result.err


def test_every_component_is_told_in_a_whole_sentence() -> None:
    load_components()
    assert not [f"{c.slot.path}={c.name}: {c.summary}" for c in components() if not c.outside and not c.summary.endswith((".", ":", ")"))]


def test_a_resume_of_what_is_done_is_told(gptlab: Command, identity: str, corpus_file: Path) -> None:
    again = gptlab("train", *tiny(corpus_file, "study=shown", "trainer.resume=2", steps=4))
    assert "trainer.resume=2 means nothing to a run that is done; --rerun trains it from its beginning" in again.out


def test_a_study_without_runs_is_none(gptlab: Command, identity: str) -> None:
    (Path(os.environ["GPTLAB_RUNS"]) / "nothing").mkdir()
    told = gptlab("compare", "nothing").err
    assert "no study is called 'nothing'; there is shown" in told


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gptlab", "--help"]
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train" in result.stdout
    assert not any(
        line.rpartition("|")[2].strip() in ("torch", "hydra", "omegaconf", "wandb", "numpy") for line in result.stderr.splitlines()
    )
    assert time.monotonic() - started < 5, "0.3 s on a quiet machine"
