"""A launch of what was composed already is Hydra's own launch, without composing again."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gptlab.config import launch as launching
from gptlab.config.errors import ConfigError
from gptlab.config.sources import config_dir
from gptlab.config.sweep import sweep

ARMS = ["-m", "hydra/sweeper=arms", "+hydra.sweeper.vary={model/norm: 'layernorm,rmsnorm'}"]
SEEN: list[tuple[dict[str, Any], dict[str, Any]]] = []


def task(composed: DictConfig) -> float:
    """Keeps what a job is given."""
    job = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=True)  # type: ignore[arg-type]
    assert isinstance(job, dict)
    told: dict[str, Any] = job["hydra"]
    told["overrides"]["hydra"] = sorted(o for o in told["overrides"]["hydra"] if not o.startswith("hydra.mode="))  # its value is in `mode`
    told.pop("hydra_help"), told.pop("help")
    told["job"].pop("name"), told["job"].pop("override_dirname")
    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    SEEN.append((dict(told), {str(key): value for key, value in config.items()}))
    return 1.0


def by_hydra(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Any]:
    SEEN.clear()
    monkeypatch.setattr(sys, "argv", ["gptlab", *arguments])
    hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(task)()
    return list(SEEN)


def by_us(*arguments: str) -> list[Any]:
    SEEN.clear()
    asked = sweep([a for a in arguments if a != "-m"], multirun="-m" in arguments)
    assert asked.launch is not None
    asked.launch(task)
    return list(SEEN)


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        ([], 1),
        (["model/norm=rmsnorm", "seed=3", "hydra.job.chdir=false"], 1),
        (["-m", "seed=0,1", "model/norm=layernorm,rmsnorm"], 4),
        (["-m", "seed=5"], 1),
        ([*ARMS, "hydra.sweeper.seeds=2"], 4),
        (["hydra.mode=MULTIRUN", "seed=0,1"], 2),
    ],
)
def test_a_job_is_given_what_hydras_own_command_line_gives_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], jobs: int
) -> None:
    monkeypatch.setenv("GPTLAB_LAUNCH", str(tmp_path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    ours = by_us(*arguments)
    assert len(ours) == jobs
    assert ours == by_hydra(monkeypatch, *arguments)


@pytest.mark.parametrize("arguments", [["seed=0,1"], ["-m", "hydra.verbose=true,false"], ["model/norm=???"]])
def test_what_hydra_would_speak_about_is_left_to_it(arguments: list[str]) -> None:
    asked = sweep([a for a in arguments if a != "-m"], multirun="-m" in arguments)
    assert asked.launch is None


@pytest.mark.parametrize("given", ["hydra.sweeper.vary={seed: '0,1'}", "hydra.sweeper.vary.seed='0,1'"])
def test_a_dictionary_of_a_sweeper_takes_a_plus(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(given.partition('=')[0])} is a new one, which takes a plus"):
        sweep(["hydra/sweeper=arms", given], multirun=True)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["name=${hydra:job.name}_${seed}"], ["train_0"]),
        (["-m", "seed=3,4", "name=${hydra:job.name}_${hydra:job.num}_${seed}"], ["train_0_3", "train_1_4"]),
        ([*ARMS, "hydra.sweeper.seeds=1", "name=${hydra:job.num}"], ["0", "1"]),
    ],
)
def test_an_override_may_refer_to_its_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    monkeypatch.setenv("GPTLAB_LAUNCH", str(tmp_path))
    assert [str(config["name"]) for _, config in by_us(*arguments)] == names
    assert HydraConfig.instance().cfg is None, "and the next has none"


def test_one_run_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []
    load = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", lambda *a, **o: composed.append(a) or load(*a, **o))  # type: ignore[func-returns-value]
    assert len(by_us("seed=3")) == 1
    assert len(composed) == 1


def test_each_job_of_a_sweep_is_composed_once_and_is_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPTLAB_LAUNCH", str(tmp_path))
    composed = []
    load = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", lambda *a, **o: composed.append(a) or load(*a, **o))  # type: ignore[func-returns-value]
    for limit, times in ((1000, 4), (1, 6)):
        monkeypatch.setattr(launching, "MOST_REMEMBERED", limit)
        composed.clear()
        jobs = by_us("-m", "seed=0,1,2")
        assert [config["seed"] for _, config in jobs] == [0, 1, 2]
        assert [hydra["job"]["num"] for hydra, _ in jobs] == [0, 1, 2]
        assert len(composed) == times, "the sweep itself, and each job; a second time what was not remembered"
