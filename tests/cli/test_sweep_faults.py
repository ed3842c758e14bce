"""A job of a sweep that fails leaves the others alone: their weights, their trackers, the process's randomness, threads and memory."""

from __future__ import annotations

import gc
import os
import random
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats  # noqa: F401  # adds its warning filter when first imported, which is not a job's doing
import torch

from gptlab import compose, train
from gptlab.config.errors import GptlabError, OutOfMemory
from gptlab.config.registry import register
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run, all_runs
from gptlab.runner.trainer import Trainer
from gptlab.tracker.wandb import _Wandb
from tests.cli.conftest import Command
from tests.faulty import losses, weights_hash
from tests.tiny import tiny

EXCEPTION, EXIT, MEMORY, NAN, BUILD = 1, 2, 3, 4, 5  # seeds, and what befalls their jobs
MODELS: dict[int, weakref.ref[Any]] = {}
ALIVE: list[tuple[int, int]] = []  # in the job of one seed, the models of others


@register("callback", "fail_by_seed")
class FailBySeed(Callback):
    """Fails as the seed says, and leaves a mess behind."""

    def on_start(self, trainer: Trainer) -> None:
        seed = trainer.config.seed
        ALIVE.extend((seed, other) for other, model in MODELS.items() if model() is not None)
        MODELS[seed] = weakref.ref(trainer.model)
        if seed == BUILD:
            raise KeyError("a callback that cannot start")

    def on_step(self, trainer: Trainer) -> None:
        seed = trainer.config.seed
        if trainer.state.step != 2 or seed not in (EXCEPTION, EXIT, MEMORY, NAN):
            return
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)
        warnings.simplefilter("error")
        if seed == EXCEPTION:
            raise RuntimeError("a component of the user's failed")
        if seed == EXIT:
            sys.exit(7)
        if seed == MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        for parameter in trainer.model.parameters():
            parameter.data.fill_(float("nan"))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    MODELS.clear()
    ALIVE.clear()
    with warnings.catch_warnings():
        yield


Standing = tuple[Any, ...]


def standing() -> Standing:
    """What a job may not leave changed in its process."""
    numpy_state = np.random.get_state(legacy=False)
    return (
        torch.get_rng_state().tolist(), str(numpy_state), random.getstate(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), list(warnings.filters), warnings.showwarning,
    )  # fmt: skip


FAILING = "+callback@callbacks.fail=fail_by_seed"


def by_seed() -> dict[int, Run]:
    return {r.config().seed: r for r in all_runs()}


@pytest.mark.slow
def test_jobs_that_fail_leave_the_others_as_they_are_alone(
    gptlab: Command, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny(corpus_file, "model.dropout=0.2", steps=6)
    finished: list[tuple[str, int]] = []
    plain_finish, plain_init = _Wandb.finish, _Wandb._init
    live: list[Any] = []

    def init(tracker: _Wandb, run: Any, mode: str) -> Any:
        made = plain_init(tracker, run, mode)
        live.append(made)
        return made

    def finish(tracker: _Wandb, summary: Any, code: int) -> None:
        finished.append((tracker._run.id, code))
        plain_finish(tracker, summary, code)

    monkeypatch.setattr(_Wandb, "finish", finish)
    monkeypatch.setattr(_Wandb, "_init", init)
    before = standing()
    result = gptlab("train", "-m", *own, FAILING, "tracker=offline", "seed=0,1,6,2,7,3,8,4,9,5,10", "study=faults")
    assert standing() == before
    assert result.code == 1, result.err
    assert "Traceback" not in result.out + result.err
    assert "11 runs: 6 trained, 0 skipped, 5 failed" in result.out
    told = [" ".join(line.split()) for line in result.err.splitlines() if line.startswith("failed: ")]
    expected = {
        EXCEPTION: ("RuntimeError: a component of the user's failed", 1), EXIT: ("something called sys.exit(7)", 1),
        MEMORY: ("out of memory at step 3", 1), NAN: ("at step 3", 4), BUILD: ("KeyError", 1),
    }  # fmt: skip
    assert len(told) == len(expected)
    runs = by_seed()
    for (seed, (words, code)), line in zip(expected.items(), told, strict=True):
        assert f"seed={seed}" in line
        assert words in line
        assert line.endswith(f"(exit {code})")
        failed = runs[seed].read("failed.json") or {}
        assert failed["code"] == code
        assert "Traceback" in (runs[seed].directory / "log.txt").read_text()
    assert not ALIVE, "a failed job's model was still in memory when a later one began"
    # each job has a W&B run of its own, which has come to its end
    assert sorted(i for i, _ in finished) == sorted(f"faults-{r.identity}" for r in runs.values())
    assert {i for i, code in finished if code == 0} == {f"faults-{runs[s].identity}" for s in (0, 6, 7, 8, 9, 10)}
    assert all(w._is_finished for w in live)
    assert all(len(list(r.directory.glob("wandb/offline-run-*/*.wandb"))) == 1 for r in runs.values())
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "alone"))
    for seed in (6, 7, 8, 9, 10):
        alone = train(compose([*own, f"seed={seed}"])).run
        assert alone.identity == runs[seed].identity
        assert weights_hash(runs[seed]) == weights_hash(alone), f"seed {seed}"
        assert losses(runs[seed]) == losses(alone)


@pytest.mark.slow
def test_the_same_sweep_again_takes_up_what_failed_and_skips_the_rest(gptlab: Command, corpus_file: Path) -> None:
    sweep = ["train", "-m", *tiny(corpus_file, steps=4), "seed=0,1,2", "study=again"]
    assert gptlab(*sweep, FAILING).code == 1
    second = gptlab(*sweep)
    assert second.code == 0, second.err
    assert "3 runs: 2 trained, 1 skipped, 0 failed" in second.out


@pytest.mark.parametrize("seed", [0, EXCEPTION, EXIT, MEMORY, NAN, BUILD])
def test_a_run_leaves_the_process_as_it_was(corpus_file: Path, seed: int) -> None:
    before = standing()
    try:
        train(compose([*tiny(corpus_file, steps=3), FAILING, f"seed={seed}"]))
    except GptlabError:
        assert seed
    assert standing() == before


@pytest.mark.parametrize("seed", [0, EXCEPTION, EXIT, MEMORY, NAN])
def test_nothing_holds_on_to_the_model_of_a_run_that_is_over(corpus_file: Path, seed: int) -> None:
    try:
        train(compose([*tiny(corpus_file, steps=3), FAILING, f"seed={seed}"]))
    except GptlabError:
        assert seed
    if seed:
        gc.collect()  # the traceback, which the caller had until now
    assert MODELS[seed]() is None


def test_what_to_turn_when_memory_is_used_up_is_told_and_checkpoints_are_untouched(corpus_file: Path) -> None:
    with pytest.raises(OutOfMemory) as error:
        train(compose([*tiny(corpus_file, "callbacks.checkpoint.every=1"), FAILING, f"seed={MEMORY}"]))
    said = str(error.value)
    assert "hardware.micro_batch=2 (now 4; the numbers stay the same)" in said
    assert "model.context_length" in said
    assert "checkpoints are untouched" in said
    (run,) = all_runs()
    first = weights_hash(run)
    assert train(compose(tiny(corpus_file, "callbacks.checkpoint.every=1", f"seed={MEMORY}", "hardware.micro_batch=2"))).run == run
    assert first != weights_hash(run)
    assert os.listdir(run.checkpoints)
