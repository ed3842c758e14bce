"""`gptlab bench train`, against a stand-in with nanoGPT's interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptlab.cli import bench
from tests.cli.conftest import Command

STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        logits = self.table(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.05)


def test_both_are_timed_in_turn_and_the_ratio_is_theirs_over_ours(gptlab: Command, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(STAND_IN)
    result = gptlab("bench", "train", "--against", str(tmp_path), "--rounds", "3", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert set(report["step_ms"]) == {"gptlab fp32", "nanoGPT fp32"}
    assert report["ratio"]["lowest"] <= report["ratio"]["median"] <= report["ratio"]["highest"]
    assert report["ratio"]["median"] < 1, "a table of pairs is faster than a Transformer"
    assert report["tokens_per_step"] == 768
    assert report["tokens_per_second"]["gptlab fp32"] == pytest.approx(768 / report["step_ms"]["gptlab fp32"] * 1000)


def test_ours_alone_says_what_tracking_adds(gptlab: Command) -> None:
    result = gptlab("bench", "train", "--rounds", "1")
    assert result.code == 0, result.err
    assert "tokens/s" in result.out
    assert "add" in result.out.splitlines()[-1]


def test_a_folder_that_is_no_checkout_is_refused(gptlab: Command, tmp_path: Path) -> None:
    result = gptlab("bench", "train", "--against", str(tmp_path))
    assert result.code == 2
    assert "holds no model.py" in result.err
    (tmp_path / "model.py").write_text("raise RuntimeError('broken')")
    broken = gptlab("bench", "train", "--against", str(tmp_path))
    assert broken.code == 2
    assert "could not be trained" in broken.err
    assert gptlab("bench", "train", "--rounds", "0").code == 2
