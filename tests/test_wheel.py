"""The wheel carries conf/ and experiments/, and works in an empty folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_recipes_and_experiments_are_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "experiments"):
        for file in (f for f in (ROOT / folder).rglob("*.*") if f.suffix in (".yaml", ".json")):
            assert f"gptlab/{file.relative_to(ROOT)}" in names
    assets = {f"gptlab/study/assets/{file.name}" for file in (ROOT / "gptlab" / "study" / "assets").iterdir()}
    assert {"gptlab/py.typed", *(f"gptlab/generate/{name}" for name in ("product.c", "product.h", "step.c")), *assets} <= set(names)
    for file in (ROOT / "gptlab" / "generate" / "server" / "assets").iterdir():
        assert f"gptlab/generate/server/assets/{file.name}" in names
    assert not any(name.startswith(("tests/", "runs/")) for name in names)


@pytest.mark.slow
def test_a_sweep_runs_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "GPTLAB_RUNS": str(tmp_path / "runs")}
    where = subprocess.run(
        [sys.executable, "-c", "import gptlab; print(gptlab.__file__)"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site) in where.stdout
    command = [sys.executable, "-m", "gptlab", "train", "experiment=quickstart", "trainer.budget=4steps", "data.validation_tokens=1024"]
    command.append("callbacks.samples.tokens=4")
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 runs: 12 trained, 0 skipped, 0 failed" in done.stdout
    assert not any(work.iterdir())
