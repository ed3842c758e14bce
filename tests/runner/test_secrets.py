"""No secret of the environment reaches a file of a run, and no run is written outside its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from gptlab import compose, train
from gptlab.config.errors import ConfigError, GptlabError
from gptlab.runner.run import all_runs
from tests.cli.conftest import Command
from tests.cli.conftest import gptlab as gptlab  # the fixture
from tests.faulty import faults
from tests.tiny import tiny

CANARY = "c4na47" * 6 + "c4n4"  # forty characters, as a W&B key has
NAMES = (
    "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_TOKEN",
    "GITHUB_TOKEN", "OPENAI_API_KEY", "DATABASE_PASSWORD", "SECRET", "GPTLAB_SECRET"
)  # fmt: skip


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret under many names of the environment."""
    for name in NAMES:
        monkeypatch.setenv(name, CANARY)
    return CANARY


@pytest.fixture(autouse=True)
def _faults() -> Iterator[None]:
    with faults():
        yield


def holding(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a secret, in their content or their name, in any of the encodings a log may use."""
    spellings = [secret.encode(), secret.encode("utf-16-le"), secret[::-1].encode()]
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    assert len(files) > 5
    return [str(f) for f in files if secret in f.name or any(s in f.read_bytes() for s in spellings)]


def test_no_file_of_a_run_or_its_mirror_holds_a_secret_of_the_environment(
    corpus_file: Path, tmp_path: Path, home_folder: Path, canary: str
) -> None:
    own = tiny(corpus_file, "tracker=offline", f"trainer.mirror={tmp_path / 'mirror'}", "callbacks.checkpoint.every=3")
    with pytest.raises(GptlabError):  # a traceback stands in log.txt
        train(compose([*own, "seed=1", "+callback@callbacks.fault=raise_at"]))
    assert train(compose(own)).state == "done"
    wandb.teardown()  # the client's own process has written all of its files then
    done, failed = sorted(all_runs(), key=lambda r: r.config().seed)
    assert "Traceback" in (failed.directory / "log.txt").read_text()
    assert list(done.directory.glob("wandb/offline-run-*/*.wandb"))
    assert list(done.directory.glob("checkpoints/*/*.safetensors"))
    assert list((tmp_path / "mirror").rglob("*.safetensors"))
    for folder in (Path(os.environ["GPTLAB_RUNS"]), tmp_path / "mirror", home_folder):
        assert not holding(folder, canary)
    planted = done.directory / "wandb" / "planted"
    planted.write_bytes(b"\x00key:" + canary.encode() + b"\xff")
    assert holding(done.directory, canary) == [str(planted)], "the search itself works"


SPELLINGS = [
    "name=${oc.env:SECRET}",
    "name=${ oc.env:SECRET}",
    "name=${oc.env: SECRET}",
    "name=${oc.env:SECRET,none}",
    "name=${oc.env:NOT_THERE,${oc.env:SECRET}}",
    "name=${oc.env:NOT_THERE,default}",
    "name=before_${oc.env:SECRET}_after",
    "name='${oc.env:SECRET}'",
    'name="${oc.env:SECRET}"',
    "name=${oc.decode:${oc.env:SECRET}}",
    r"name=\${oc.env:SECRET}",
    "study=${oc.env:SECRET}",
    "+data.validation={held:${oc.env:SECRET}}",
    "+data.validation.held=${oc.env:SECRET}",
    "callbacks.samples.prompt=${oc.env:SECRET}",
    "tracker.project=${oc.env:SECRET}",
    "hydra.job.name=${oc.env:SECRET}",
    "hydra.searchpath=[${oc.env:SECRET}]",
]
# Those that name the resolver by parts: no word in them is oc.env.
BY_PARTS = [
    ["study=env", "name='${oc.${study}:SECRET}'"],
    ["study=oc", "name='${${study}.env:SECRET}'"],
    ["study=oc", "name='${oc.decode:${${study}.env:SECRET}}'"],
    ["study=env", "callbacks.samples.prompt='a ${oc.${study}:SECRET} z'"],
    ["study=env", "+data.validation.held='${oc.${study}:SECRET,x}'"],
    ["study=env", "hydra.job.name='${oc.${study}:SECRET}'", "name=${hydra:job.name}"],
]


@pytest.mark.parametrize("given", [[s] for s in SPELLINGS] + BY_PARTS, ids=lambda g: " ".join(g))
def test_an_override_that_interpolates_the_environment_is_refused(
    gptlab: Command, corpus_file: Path, canary: str, given: list[str]
) -> None:
    result = gptlab("train", *tiny(corpus_file), "tracker=offline", *given)
    assert result.code == 2, result.out + result.err
    assert len(result.err.strip().splitlines()) == 1
    assert canary not in result.out + result.err
    assert not Path(os.environ["GPTLAB_RUNS"]).exists()
    assert "would write the environment into the run" in result.err
    if "name=${hydra:job.name}" not in given:  # only a task of Hydra's has a job
        with pytest.raises(ConfigError, match="would write the environment into the run"):
            compose([*tiny(corpus_file), "tracker=offline", *given])


@pytest.mark.parametrize(
    "content",
    [
        'name: "${oc.env:SECRET}"',
        'name: "a${ oc.env : SECRET }"',
        "study: ${oc.env:SECRET,none}",
        'callbacks: {samples: {prompt: "${oc.env:SECRET}"}}',
        'data: {validation: {held: "${oc.decode:${oc.env:SECRET}}"}}',
        'seed: 0\nstudy: env\nname: "${oc.${study}:SECRET}"',
        'hydra: {mode: MULTIRUN, sweeper: {params: {name: "${oc.env:SECRET},other"}}}',
        'study: env\nhydra: {mode: MULTIRUN, sweeper: {params: {callbacks.samples.prompt: "x${oc.${study}:SECRET},other"}}}',
        'hydra: {job: {name: "${oc.env:SECRET}"}}\nname: "${hydra:job.name}"',
    ],
)
def test_an_experiment_of_the_users_that_interpolates_the_environment_is_refused(
    gptlab: Command, corpus_file: Path, canary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    monkeypatch.chdir(tmp_path)
    result = gptlab("train", *tiny(corpus_file, steps=2), "experiment=mine")
    assert result.code == 2, result.out + result.err
    assert "would write the environment into the run" in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert canary not in result.out + result.err
    assert not Path(os.environ["GPTLAB_RUNS"]).exists()


def test_an_experiment_without_the_environment_works_and_so_does_the_resolver_afterwards(
    gptlab: Command, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary: str
) -> None:
    from omegaconf import OmegaConf

    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text('seed: 3\nname: "seed_${seed}"\n')
    monkeypatch.chdir(tmp_path)
    assert gptlab("train", *tiny(corpus_file, steps=2), "experiment=mine").code == 0
    (run,) = all_runs()
    assert run.name == "seed_3"
    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == canary, "another program's configs are none of ours"


OUTSIDE = ["../evil", "..", ".", "/tmp/evil", "a/b", "../../evil", "a\\b", "..\\evil", "a\nb", "a\x00b", "a\x1bb", "/"]


@pytest.mark.parametrize("key", ["study", "name"])
def test_a_study_or_name_that_leads_elsewhere_is_refused(gptlab: Command, corpus_file: Path, tmp_path: Path, key: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    config = compose(tiny(corpus_file))
    for value in OUTSIDE:
        setattr(config, key, value)  # however it came there
        with pytest.raises(ConfigError, match="is the name of a folder"):
            train(config)
    result = gptlab("train", *tiny(corpus_file), f"{key}='../evil'")
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert sorted(tmp_path.rglob("*")) == before
