"""The W&B workspace of a study: its JSON without an account, saved through the real client with one, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.cli.conftest import Command
from tests.stand_ins.wandb_server import Server, wandb_server
from tests.tiny import tiny


@pytest.fixture
def study(gptlab: Command, corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(corpus_file.parent))  # where `wandb login` writes its key
    gptlab("train", "-m", *tiny(corpus_file, steps=4), "model/norm=layernorm,rmsnorm", "model.width=16,32", "study=norms")
    return "norms"


@pytest.fixture
def online(study: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server
    wandb.teardown()


def panels(file: Path) -> dict[str, list[dict[str, Any]]]:
    bank = json.loads(file.read_text(encoding="utf-8"))["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in bank}


def test_without_an_account_its_json_is_written(gptlab: Command, study: str, tmp_path: Path) -> None:
    file = tmp_path / "norms.json"
    result = gptlab("dashboard", study, "--json", str(file))
    assert result.code == 0, result.err
    assert str(file) in result.out.replace("\n", "")
    found = panels(file)
    assert list(found) == ["Verdict", "Held-out loss", "Training", "Cost", "Settings", "Samples"]
    assert "| arm | seeds | val/loss |" in found["Verdict"][0]["config"]["value"]
    assert [p["config"].get("xAxis") for p in found["Held-out loss"]][:4] == ["step", "tokens", "flops", "seconds"]
    lines = [p for p in found["Held-out loss"] if "Line" in p["viewType"]]
    assert {(p["config"]["groupAgg"], p["config"]["groupArea"]) for p in lines} == {("mean", "stddev")}
    columns = [c["accessor"] for c in found["Settings"][0]["config"]["columns"]]
    assert any("norm" in c for c in columns)
    assert any("width" in c for c in columns)
    assert columns[-1] == "summary:val/loss"
    runs = json.loads(file.read_text())["section"]["runSets"][0]
    assert runs["filters"]["filters"][0]["value"] == "norms"
    assert runs["grouping"] == [{"section": "run", "name": "jobType"}]


def test_sections_and_panels_are_config(gptlab: Command, study: str, tmp_path: Path) -> None:
    file = tmp_path / "norms.json"
    without = "~dashboard/section@dashboard.sections.samples"
    result = gptlab("dashboard", study, without, "dashboard.sections.loss.title=Losses", "--json", str(file))
    assert result.code == 0, result.err
    assert list(panels(file)) == ["Verdict", "Losses", "Training", "Cost", "Settings"]


def test_with_an_account_it_is_saved(gptlab: Command, study: str, online: Server) -> None:
    result = gptlab("dashboard", study, "--entity", "tester")
    assert result.code == 0, result.err
    assert "saved: " in result.out
    (view,) = online.views
    assert view["displayName"] == "Ablation norms"
    assert "Held-out loss" in view["spec"]


def test_a_proxy_that_answers_html_costs_a_sentence_and_leaves_the_json(
    gptlab: Command, study: str, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.manner = "html"
    result = gptlab("dashboard", study, "--entity", "tester")
    assert result.code == 74
    assert "W&B did not take the dashboard" in result.err
    assert "dashboard.json" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dashboard=ablatoin",), "dashboard=ablatoin is not known (did you mean ablation?)"),
        (("dashboard.sections.loss.panels=[{kind: lines}]",), "kind=lines is no panel (did you mean line?)"),
        (("dashboard.sections.loss.panels=[{kind: line, metrics: [val/loss], x: stpe}]",), "x=stpe is no axis (did you mean step?)"),
        (("dashboard.sections.loss.panels=[{kind: bar}]",), "a panel of kind=bar needs metrics"),
        (("dashboard.sections.loss.tilte=x",), "dashboard.sections.loss.tilte is not a key"),
    ],
)
def test_what_is_wrong_is_one_sentence(gptlab: Command, study: str, arguments: tuple[str, ...], said: str) -> None:
    result = gptlab("dashboard", study, *arguments)
    assert result.code == 2
    assert said in " ".join(result.err.split())


def test_its_folder_is_made(gptlab: Command, study: str, tmp_path: Path) -> None:
    assert gptlab("dashboard", study, "--json", str(tmp_path / "new" / "w.json")).code == 0
    assert panels(tmp_path / "new" / "w.json")


def test_an_empty_study_has_none(gptlab: Command, corpus_file: Path) -> None:
    failed = gptlab("train", "-m", *tiny(corpus_file, steps=4), "optimizer.learning_rate=1e30", "study=empty")
    assert failed.code
    result = gptlab("dashboard", "empty")
    assert result.code == 2
    assert "has no run that is done" in " ".join(result.err.split())
    assert gptlab("dashboard", "nowhere").code == 2
