"""Each reproduction is the published setting, and trains its first steps here on data of the same shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.registry import build, component_of
from gptlab.config.resolve import parse_budget
from gptlab.model.transformer import count_parameters, flops_per_token, meta_model
from gptlab.runner.reference import RECORDED, load
from tests.conftest import sentences
from tests.stand_ins.hub_server import hub_server, write_repository

GPT2_VOCABULARY, GERMAN_VOCABULARY = 50257, 32768
# From the published scripts: (parameters, tokens a step, steps, warm-up steps, rate, betas, context).
PUBLISHED: dict[str, tuple[int, int, int, int, float, tuple[float, float], int]] = {
    # nanoGPT's config/train_gpt2.py and the defaults of its train.py; no biases, vocabulary padded to 50,304
    "gpt2_124m_openwebtext": (124_373_760, 12 * 1024 * 40, 600_000, 2000, 6e-4, (0.9, 0.95), 1024),
    # build-nanogpt's train_gpt2.py
    "gpt2_124m_fineweb_edu": (124_475_904, 2**19, 19_073, 715, 6e-4, (0.9, 0.95), 1024),
    # nanoGPT's config/train_shakespeare_char.py
    "workshop_shakespeare": (10_745_088, 64 * 256, 5000, 100, 1e-3, (0.9, 0.99), 256),
}
# A model and steps that take a second; the published rate, schedule, optimizer, data and precision stay.
SHORT = ("data.validation_tokens=256", "callbacks.samples.tokens=2", "schedule.warmup=1", "hardware.device=cpu", "hardware.compile=false",
         "trainer.budget=2steps", "trainer.log_every=1", "callbacks.evaluation.every=1", "tracker=none", "hardware.threads=1")  # fmt: skip
SMALL = (
    "model.width=64",
    "model.depth=2",
    "model.heads=2",
    "model.context_length=64",
    "trainer.batch_tokens=256",
    "hardware.micro_batch=auto",
)
HELD_OUT = ("data.corpus.held_out=4k",)
GERMAN = ("data.tokenizer.vocabulary=320", "data.tokenizer.characters=100k",
          *(f"data.corpus.sources.{name}.held_out=4k" for name in ("web", "wikipedia", "posts", "video", "travel")))  # fmt: skip
OWN = {"gpt2_124m_openwebtext": HELD_OUT, "gpt2_124m_fineweb_edu": HELD_OUT, "gpt2_124m_a100": HELD_OUT, "german_110m": GERMAN}
# Of their own size, in the few tokens a CPU takes in seconds; a checkpoint of 1.5 GB is left out.
FULL = ("model.context_length=256", "trainer.batch_tokens=1024", "hardware.micro_batch=auto", "~callback@callbacks.checkpoint")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub that has something in the place of each data set."""
    folder = tmp_path_factory.mktemp("hub")
    texts = [sentences(6, seed=i) for i in range(400)]
    sets: dict[str, dict[str, dict[str, list[str]]]] = {
        "Skylion007/openwebtext": {"default": {"train": texts}},
        "HuggingFaceFW/fineweb-edu": {"sample-10BT": {"train": texts}},
        "PatrickHaller/fineweb-2-de-1B": {"default": {"train": texts[:80]}},
        "arnomatic/german-wikipedia-clean-2": {"default": {"train": texts[80:160]}},
        "coral-nlp/german-commons": {
            "web": {"onemillionposts": texts[160:240], "youtubecommons": texts[240:320]},
            "cultural": {"wikivoyage": texts[320:]},
        },
    }
    with hub_server() as server:
        for number, (name, content) in enumerate(sets.items()):
            server.publish(name, write_repository(folder / str(number), content))
        yield server.url


def first_steps(experiment: str, hub: str, folder: Path, *more: str) -> dict[str, Any]:
    """`gptlab train experiment=…` as a process of its own; what its run left: the config, the metrics, the output."""
    text = folder / "shakespeare.txt"
    text.write_text(sentences(1200), encoding="utf-8")
    own = OWN.get(experiment, (f"data.corpus.path={text}",))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "GPTLAB_HOME": str(folder / "home"),
    }
    command = [sys.executable, "-m", "gptlab", "train", f"experiment={experiment}", *SHORT, *own, *more]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = next(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/done.json")).parent
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"config": json.loads((run / "config.json").read_text())["config"], "lines": lines, "out": done.stdout, "folder": run}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_setting_is_the_published_one(experiment: str) -> None:
    parameters, tokens, steps, warmup, rate, betas, context = PUBLISHED[experiment]
    config: Any = compose([f"experiment={experiment}"])
    vocabulary = 65 if "shakespeare" in experiment else GPT2_VOCABULARY
    assert count_parameters(meta_model(config.model, vocabulary=vocabulary))["total"] == parameters
    assert (config.trainer.batch_tokens, config.trainer.budget) == (tokens, f"{steps}steps")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.trainer.gradient_clip) == (rate, 0.1, 1.0)
    assert (config.optimizer.beta1, config.optimizer.beta2) == betas
    assert config.model.context_length == context
    assert config.model.dropout == (0.2 if "shakespeare" in experiment else 0.0)
    factor = build(config.schedule, batch_tokens=tokens, steps=steps, start=0)
    assert factor(warmup - 1, steps) < 1 <= factor(warmup, steps) + 1e-6
    assert factor(steps - 1, steps) == pytest.approx(0.1, abs=1e-3)
    if vocabulary == GPT2_VOCABULARY:
        padded = meta_model(config.model, vocabulary=vocabulary)
        assert padded.embedding.weight.shape[0] == 50_304


@pytest.mark.parametrize("experiment", [*PUBLISHED, "nanogpt_shakespeare_cpu"])
def test_it_is_the_setting_of_the_reference_that_it_is_held_against(experiment: str) -> None:
    config: Any = compose([f"experiment={experiment}"])
    reference = load(config.callbacks["reference"].curve)
    assert (reference.batch_tokens, reference.context_length) == (config.trainer.batch_tokens, config.model.context_length)
    assert f"{reference.steps}steps" == config.trainer.budget
    assert reference.tokenizer == component_of(config.data.tokenizer).name
    assert reference.corpus == getattr(config.data.corpus, "dataset", component_of(config.data.corpus).name)


def test_fifteen_dollars_pay_for_the_horizon_of_one_a100() -> None:
    config: Any = compose(["experiment=gpt2_124m_a100"])
    model = meta_model(config.model, vocabulary=GPT2_VOCABULARY)
    budget = parse_budget(config.trainer.budget)
    seconds = budget.amount * config.trainer.batch_tokens * flops_per_token(model) / (0.30 * 312e12)
    assert 14 < seconds / 3600 * 1.29 < 15
    encoded = codec.flatten(config)
    assert (encoded["hardware/checkpointing"], encoded["objective.chunk"], encoded["hardware.precision"]) == ("block", 4096, "bf16")
    assert (encoded["optimizer"], encoded["schedule"]) == ("adamw", "cosine")


def test_the_german_model_has_110_million_parameters() -> None:
    config: Any = compose(["experiment=german_110m"])
    assert config.data.tokenizer.vocabulary == GERMAN_VOCABULARY
    total = count_parameters(meta_model(config.model, vocabulary=GERMAN_VOCABULARY))["total"]
    assert 109e6 < total < 111e6
    steps = 20 * total / config.trainer.batch_tokens
    assert 4100 < steps < 4300


QUICK = ("gpt2_124m_a100", "workshop_shakespeare")  # of the others each takes ten seconds, for the imports of two processes
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OWN if name not in QUICK]


@pytest.mark.parametrize("experiment", [*QUICK, *SLOW])
def test_the_first_steps_train_on_stand_in_data(experiment: str, hub: str, tmp_path: Path, tiktoken_cache: Path) -> None:
    left = first_steps(experiment, hub, tmp_path, *SMALL)
    assert [line["step"] for line in left["lines"] if "train/loss" in line] == [1, 2]
    losses = [line["val/loss"] for line in left["lines"] if "val/loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    chosen = codec.encode(compose([f"experiment={experiment}"]))
    for part in ("optimizer", "objective"):
        assert left["config"][part] == chosen[part], "what was trained is what the experiment says"
    assert not any(RECORDED in line for line in left["lines"]), "another context is another setting: the reference is left out"
    assert ("not comparable with" in left["out"]) == ("reference" in chosen["callbacks"])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OWN)
def test_the_first_steps_of_the_whole_model_train(experiment: str, hub: str, tmp_path: Path, tiktoken_cache: Path) -> None:
    left = first_steps(experiment, hub, tmp_path, *FULL)
    losses = [line["train/loss"] for line in left["lines"] if "train/loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_the_workshop_stays_under_four_gigabytes_on_a_cpu(hub: str, tmp_path: Path) -> None:
    left = first_steps("workshop_shakespeare", hub, tmp_path, "data.validation_tokens=8192")
    done = json.loads((left["folder"] / "done.json").read_text())["summary"]
    assert left["config"]["hardware"]["micro_batch"] == 16
    assert left["config"]["trainer"]["batch_tokens"] == 64 * 256
    assert 0.5e9 < done["memory/peak_bytes"] < 4e9
