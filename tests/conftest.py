"""What every test shares: folders of its own, no network, one thread, and texts that may be missing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from gptlab.config import registry
from gptlab.runner.run import Run
from tests.tiny import tiny

SHARED = Path(__file__).parents[1].parent / "shared"
WORDS = [
    "the",
    "a",
    "king",
    "queen",
    "and",
    "of",
    "night",
    "day",
    "sings",
    "reads",
    "builds",
    "small",
    "great",
    "model",
    "token",
    "table",
    "light",
    "river",
    "stone",
    "under",
    "over",
    "again",
]

MEASURED_AND_SAVED = ("study=shown", "callbacks.checkpoint.every=4", "callbacks.checkpoint.best=false", "callbacks.evaluation.every=4")

# One thread each: the tests run side by side, and their models are too small for two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup: of the slow tests that start processes of their own, one at a time."""
    for item in items:
        if item.get_closest_marker("slow") and "runner" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def home_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's $GPTLAB_HOME: data prepared by one test is found by the next."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_folders(home_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's data and runs, and none asks a network."""
    monkeypatch.setenv("GPTLAB_HOME", str(home_folder))
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("GPTLAB_PLUGINS", "PYTHONPATH"):  # --plugin adds to these, and a test's plugin is gone after it
        monkeypatch.setenv(name, "" if name == "GPTLAB_PLUGINS" else os.environ.get(name, ""))
    cache = SHARED / "data" / "tiktoken_cache"
    if cache.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


@pytest.fixture(autouse=True)
def _own_components() -> Iterator[None]:
    """A component that a test registers is gone after it."""
    before = set(registry._COMPONENTS)
    yield
    for slot, name in set(registry._COMPONENTS) - before:
        if registry._COMPONENTS[slot, name].outside:
            del registry._BY_OPTIONS[registry._COMPONENTS.pop((slot, name)).options]
            group = ConfigStore.instance().repo
            for part in slot.split("/"):
                group = group.get(part, {})
            group.pop(f"{name}.yaml", None)


@pytest.fixture(autouse=True)
def _no_job_of_another_test() -> None:
    """A program begins without a job of Hydra's; here the one of the test before would still be there."""
    HydraConfig.instance().cfg = None


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A $GPTLAB_HOME of this test's own, with nothing in it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("GPTLAB_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared_text() -> Callable[[str], Path]:
    """`shared_text("tinyshakespeare.txt")`: a text of the shared folder, or a skip that says what is missing."""

    def find(name: str) -> Path:
        file = SHARED / "data" / "text" / name
        if not file.is_file():
            pytest.skip(f"needs {os.path.relpath(file, Path(__file__).parents[1])}, which is not here")
        return file

    return find


@pytest.fixture(scope="session")
def tiktoken_cache() -> Path:
    """The folder of tiktoken's vocabularies, or a skip."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(given) if given else SHARED / "data" / "tiktoken_cache"
    if not folder.is_dir():
        pytest.skip("needs tiktoken's vocabularies: set TIKTOKEN_CACHE_DIR")
    return folder


def sentences(count: int, seed: int = 0) -> str:
    """The same made-up sentences for the same seed."""
    draw = random.Random(seed)
    said = (" ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() for _ in range(count))
    return "".join(sentence + draw.choice([".\n", ". ", "?\n\n"]) for sentence in said)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kilobytes of text, for runs that take no time."""
    file = tmp_path_factory.mktemp("text") / "small.txt"
    file.write_text(sentences(200), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained_once(home_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a run of twelve steps that is done, with the checkpoints of steps 8 and 12, measured at both."""
    from gptlab import compose, train

    folder = tmp_path_factory.mktemp("trained") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(folder))
        train(compose(tiny(corpus_file, *MEASURED_AND_SAVED)))
    return folder


@pytest.fixture
def finished_run(trained_once: Path, tmp_path: Path) -> Run:
    """A copy of that run, in this test's own folder of runs."""
    shutil.copytree(trained_once, tmp_path / "runs")
    return Run(next((tmp_path / "runs" / "shown").glob("*/done.json")).parent)
