"""The chatbots of a card's size go their whole way: with a small model, in three steps a stage, from a hub on this machine."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from tests.conftest import sentences
from tests.stand_ins.hub_server import hub_server, write_repository

SMALL = ("model.width=64", "model.depth=2", "model.heads=2", "model.context_length=256", "trainer.batch_tokens=2048", "schedule.warmup=1",
         "hardware.micro_batch=auto", "hardware.device=cpu", "hardware.threads=1", "hardware.compile=false", "trainer.budget=3steps",
         "data.validation_tokens=2048", "callbacks.samples.tokens=4", "tracker=none")  # fmt: skip


def published(folder: Path, splits: dict[str, list[dict[str, Any]]], config: str = "default") -> Path:
    """A data set repository of records."""
    folder.mkdir()
    header = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, records in splits.items():
        header += [f"  - split: {split}", f"    path: {split}.jsonl"]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "README.md").write_text("\n".join([*header, "---", ""]), encoding="utf-8")
    return folder


def turns(number: int, asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": asked, "content": sentences(2, seed=number)}, {"role": said, "content": sentences(3, seed=-number)}]


def smoltalk(count: int) -> list[dict[str, Any]]:
    return [{"messages": turns(i, "user", "assistant"), "source": "made-up"} for i in range(1, count + 1)]


def ultrafeedback(count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(1, count + 1):
        chosen = turns(i, "user", "assistant")
        rejected = [chosen[0], {"role": "assistant", "content": sentences(2, seed=-1000 - i)}]
        scores = {"score_chosen": 8.0, "score_rejected": 5.0}
        made.append(
            {"prompt": chosen[0]["content"], "prompt_id": str(i), "chosen": chosen, "rejected": rejected, "messages": chosen} | scores
        )
    return made


def oasst(count: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        asked, said = turns(i, "prompter", "assistant")
        told = [("q", None, asked, None), ("a", f"q{i}", said, 0.0), ("b", f"q{i}", asked | {"role": "assistant"}, 1.0)]
        for name, parent, turn, rank in told:
            about = {"lang": "de", "deleted": False, "rank": rank, "role": turn["role"], "text": turn["content"]}
            made.append({"message_id": f"{name}{i}", "parent_id": parent} | about)
    return made


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with something in the place of each data set, of text more than is held out."""
    folder = tmp_path_factory.mktemp("hub")
    draw = random.Random(0)
    words = ["".join(draw.choices(ascii_lowercase, k=8)) for _ in range(40_000)]  # a tokeniser of 32,768 tokens wants as many
    texts = [" ".join(draw.choices(words, k=700)) for _ in range(900)]
    with hub_server() as server:
        named = {
            "HuggingFaceFW/fineweb-edu": "sample-10BT",
            "PatrickHaller/fineweb-2-de-1B": "default",
            "arnomatic/german-wikipedia-clean-2": "default",
        }
        for number, (name, config) in enumerate(named.items()):
            server.publish(name, write_repository(folder / str(number), {config: {"train": texts}}, row_group=100))
        commons = {"web": {"onemillionposts": texts, "youtubecommons": texts}, "cultural": {"wikivoyage": texts}}
        server.publish("coral-nlp/german-commons", write_repository(folder / "commons", commons, row_group=100))
        server.publish("HuggingFaceTB/smoltalk", published(folder / "smoltalk", {"train": smoltalk(200), "test": smoltalk(20)}, "all"))
        pairs = {"train_prefs": ultrafeedback(100), "test_prefs": ultrafeedback(10)}
        server.publish("HuggingFaceH4/ultrafeedback_binarized", published(folder / "ultrafeedback", pairs))
        server.publish("OpenAssistant/oasst2", published(folder / "oasst", {"train": oasst(200), "validation": oasst(20)}))
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "stages"),
    [
        (
            "chatbot_gpt2",
            {"text": ("lm", "hub"), "chats": ("sft", "chat_hub"), "preferences": ("dpo", "chat_hub"), "sums": ("grpo", "drills")},
        ),
        ("chatbot_de", {"text": ("lm", "mix"), "chats": ("sft", "oasst"), "drills": ("sft", "drills"), "sums": ("grpo", "drills")}),
    ],
)
def test_every_stage_trains_on_the_hubs_data_and_the_one_before_it(
    experiment: str, stages: dict[str, tuple[str, str]], hub: str, tmp_path: Path, tiktoken_cache: Path
) -> None:
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "GPTLAB_HOME": str(tmp_path / "home")}

    def gptlab(*words: str) -> str:
        command = [sys.executable, "-m", "gptlab", *words]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told = gptlab("train", f"experiment={experiment}", *SMALL)
    chain = json.loads(gptlab("runs", "lineage", f"{experiment}/sums", "--json"))
    assert {one["name"]: (one["objective"], one["data"]) for one in chain} == stages
    assert [one["began"] for one in chain] == ["nothing", *(f"{name}@3" for name in list(stages)[:-1])]
    assert all(one["loss"] < math.log(60_000) for one in chain)
    assert f"talk to it: gptlab chat {chain[-1]['run']}" in told
