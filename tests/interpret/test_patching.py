"""Patching everything is the other run; one position, one path are what a forward written by hand gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptlab import load
from gptlab.config.errors import ConfigError
from gptlab.interpret import attribute, capture, patch, patch_paths, run_with
from gptlab.runner.run import Run
from tests.interpret.conftest import PARTS, small, some_tokens

SOURCE, TARGET = some_tokens(1, 8, seed=1), some_tokens(1, 8, seed=2)


def token_7(logits: Tensor) -> Tensor:
    return logits[0, -1, 7]


@pytest.mark.parametrize("kind", [kind for kind in PARTS if kind != "flex"])
@torch.no_grad()
def test_patching_everything_is_the_other_run(kind: str) -> None:
    model = small(**PARTS[kind])
    everything = dict(capture(model, SOURCE))
    assert torch.equal(run_with(model, TARGET, everything).logits, capture(model, SOURCE).logits)
    last = f"blocks.{len(model.blocks) - 1}" if model.blocks else "embedded"
    found = patch(model, SOURCE, TARGET, last, positions=False, metric=token_7)
    assert found.columns == ["all"]
    assert float(found.values) == found.of_source == float(model(SOURCE)[0, -1, 7])
    assert found.of_target == float(model(TARGET)[0, -1, 7]) != found.of_source
    assert found.recovered.item() == 1
    same = patch(model, TARGET, TARGET, last, metric=token_7)
    torch.testing.assert_close(same.values, torch.full_like(same.values, same.of_target), rtol=0, atol=1e-6)  # nothing is changed


@torch.no_grad()
def test_a_matrix_of_names_and_positions() -> None:
    model = small(**PARTS["llama"])
    found = patch(model, SOURCE, TARGET, answer=3, against=5)
    assert found.rows == ["embedded", "blocks.0", "blocks.1", "blocks.2"]
    assert found.columns == [str(i) for i in range(8)]
    assert found.measure == "the last position's logit of token 3 less that of token 5"
    assert found.frame().loc["blocks.2", "7"] == pytest.approx(1)
    assert found.recovered[3, :7].abs().max() < 1e-5, "behind the last block no position sees another"
    mixed = TARGET.clone()
    mixed[:, 4] = SOURCE[:, 4]
    logits = model(mixed)[0, -1]
    assert float(found.values[0, 4]) == pytest.approx(float(logits[3] - logits[5]), abs=1e-5), "the embedding at 4 is the token at 4"
    rows = patch(model, SOURCE.expand(3, -1), TARGET.expand(3, -1), answer=3, against=5)
    torch.testing.assert_close(rows.values, found.values, rtol=0, atol=1e-5)
    guess = patch(model, SOURCE, TARGET, "blocks.0")
    good, bad = model(SOURCE)[0, -1].argmax(), model(TARGET)[0, -1].argmax()
    assert f"token {good} less that of token {bad}" in guess.measure
    assert guess.of_source > 0 > guess.of_target
    heads = patch(model, SOURCE, TARGET, ["blocks.*.attention.head.*", "blocks.1.attention.pattern"], answer=3, against=5)
    assert heads.values.shape == (13, 8)


@torch.no_grad()
def test_a_patched_pattern_of_a_fused_kernel_is_used() -> None:
    for kernel in ("naive", "sdpa"):
        model = small(kernel=kernel)
        name = "blocks.0.attention.pattern"
        other = capture(model, SOURCE, [name])[name]
        logits = run_with(model, TARGET, {name: other}, [name, "blocks.0.attention.v", "blocks.0.attention.z"])
        by_hand = (other @ logits["blocks.0.attention.v"]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(logits["blocks.0.attention.z"], by_hand)
        assert torch.equal(logits[name], other)


@torch.no_grad()
def test_the_direct_path_to_the_logits_is_the_attribution() -> None:
    model = small(norm="none")
    found = patch_paths(model, SOURCE, TARGET, ["blocks.0.attention.head.1", "blocks.0.ffn", "embedded"], metric=token_7)
    assert found.columns == ["logits"]
    mine, theirs = attribute(model, SOURCE, 7), attribute(model, TARGET, 7)

    def change(*names: str) -> float:
        rows = [mine.components.index(name) for name in names]
        return float((mine.values - theirs.values)[rows, 0, -1].sum())

    expected = [change("blocks.0.attention.head.1"), change("blocks.0.ffn"), change("embedding", "position")]
    torch.testing.assert_close(found.values[:, 0] - found.of_target, torch.tensor(expected), rtol=0, atol=1e-5)
    total = patch(model, SOURCE, TARGET, found.rows, positions=False, metric=token_7)
    assert (total.values - found.values).abs().min() > 1e-3, "the whole effect is another than the direct one"


@torch.no_grad()
def test_a_path_between_two_parts_is_the_one_written_by_hand() -> None:
    model = small(depth=2)
    senders, receivers = ["embedded", "blocks.0.attention.head.1"], ["blocks.1.ffn", "blocks.1.attention.head.0"]
    found = patch_paths(model, SOURCE, TARGET, senders, receivers, metric=token_7)
    names = ["embedded", "blocks.0.attention", "blocks.0.attention.z", "blocks.0.ffn", "blocks.1.attention"]
    mine, theirs = capture(model, SOURCE, names), capture(model, TARGET, names)
    block = model.blocks[1]
    stream = mine["embedded"] + theirs["blocks.0.attention"] + theirs["blocks.0.ffn"] + theirs["blocks.1.attention"]
    written = block.ffn(block.ffn_norm(stream), None)
    expected = run_with(model, TARGET, {"blocks.1.ffn": written}).logits[0, -1, 7]
    assert float(found.values[0, 0]) == pytest.approx(float(expected), abs=1e-5)
    z = theirs["blocks.0.attention.z"].clone()
    z[..., 6:12] = mine["blocks.0.attention.z"][..., 6:12]
    stream = theirs["embedded"] + model.blocks[0].attention.out(z) + theirs["blocks.0.ffn"]
    heard = run_with(model, TARGET, {"blocks.0": stream}, "blocks.1.attention.head.0")
    expected = run_with(model, TARGET, {"blocks.1.attention.head.0": heard["blocks.1.attention.head.0"]}).logits[0, -1, 7]
    assert float(found.values[1, 1]) == pytest.approx(float(expected), abs=1e-5)
    assert ((found.values - found.of_target).abs() > 1e-4).all()
    back = patch_paths(model, SOURCE, TARGET, "blocks.1.ffn", "blocks.0.attention.head.0", metric=token_7)
    assert float(back.values) == back.of_target, "no path leads back"


def test_answers_may_be_texts(finished_run: Run) -> None:
    run = load(finished_run)
    e, a = (int(run.tokenizer.encode(letter)[0]) for letter in "ea")
    by_text = patch(run, "the king", "the rive", "blocks.0", answer="e", against="a")
    assert torch.equal(by_text.values, patch(run, "the king", "the rive", "blocks.0", answer=e, against=a).values)
    assert by_text.measure == "the last position's logit of 'e' less that of 'a'"
    assert torch.equal(attribute(run, "the king", "e", against="a").values, attribute(run, "the king", e, against=a).values)
    with pytest.raises(ConfigError, match="'king' is 4 tokens of the tokeniser char"):
        attribute(run, "the king", "king")


def test_prompts_that_do_not_fit_are_told() -> None:
    model = small()
    with pytest.raises(ConfigError, match="the source prompt has 8 tokens and the target prompt 7: patching"):
        patch(model, SOURCE, TARGET[:, :7])
    with pytest.raises(ConfigError, match="the source prompt has 17 tokens, more than"):
        patch(model, torch.zeros(1, 17, dtype=torch.long), TARGET)
    with pytest.raises(ConfigError, match="both prompts have the same answer, token"):
        patch(model, TARGET, TARGET)
    with pytest.raises(ConfigError, match=r"logit of token 1 less that of token 2 is \S+ in both runs, so that nothing can be recovered"):
        patch(model, TARGET, TARGET, "blocks.0", answer=1, against=2).frame()
    with pytest.raises(ConfigError, match="there is no token 40"):
        patch(model, SOURCE, TARGET, answer=40)
    with pytest.raises(ConfigError, match="the source prompt has 8 tokens and the target prompt 7: patching"):
        patch_paths(model, SOURCE, TARGET[:, :7], "embedded")
    with pytest.raises(ConfigError, match=r"blocks.0.ffn.slots has no positions"):
        patch(small(**PARTS["experts"]), SOURCE, TARGET, "blocks.0.ffn.slots", metric=token_7)
    with pytest.raises(ConfigError, match=r"blocks.0.ffn has no positions \(its shape is \(\)\)"):
        patch(small(**PARTS["no norm, no ffn"]), SOURCE, TARGET, "blocks.0.ffn", metric=token_7)
    for silent in ("position", "positio[n]"):
        with pytest.raises(ConfigError, match="gives no activation"):
            patch(model, SOURCE, TARGET, silent, metric=token_7)
        with pytest.raises(ConfigError, match="gives no activation"):
            patch_paths(model, SOURCE, TARGET, silent, metric=token_7)
        with pytest.raises(ConfigError, match="gives no activation"):
            patch_paths(model, SOURCE, TARGET, "embedded", ["logits", silent], metric=token_7)


@pytest.mark.parametrize("length", [4, 8])
def test_a_gate_is_patched_at_its_positions_and_not_at_its_heads(length: int) -> None:
    model, source, target = small(gate="per_head"), SOURCE[:, :length], TARGET[:, :length]
    names = ["blocks.2.attention.gate", "blocks.2.attention.z"]  # the one is the other, with the heads apart
    found = patch(model, source, target, names, metric=token_7)
    assert found.values.shape == (2, length)
    torch.testing.assert_close(found.values[0], found.values[1], rtol=0, atol=1e-6)
    assert (found.values[0, :-1] - found.of_target).abs().max() < 1e-6, "behind the last attention no position sees another"


def test_a_matrix_is_drawn_with_its_rows_its_labels_and_its_numbers(finished_run: Run, tmp_path: Path) -> None:
    run = load(finished_run)
    one, other = "the king", "the rive"
    found = patch(run, one, other, answer="a", against="e")
    assert found.measure == "the last position's logit of 'a' less that of 'e'"
    drawn = found.draw(tmp_path / "patched.svg", labels=list(other))
    seen = re.sub(r"<[^>]+>", "", re.sub(r"<!--(.*?)-->", r"\1", drawn.read_text()))
    assert all(name in seen for name in found.rows)
    assert f"{round(float(found.recovered[0, 4]), 2) + 0.0:.2f}".replace("-", "") in seen
    assert found.draw(tmp_path / "patched.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"written as one of \.png, \.svg, \.pdf"):
        found.draw(tmp_path / "patched.txt")
    with pytest.raises(ConfigError, match="there are 3 labels for 8 columns"):
        found.draw(tmp_path / "patched.png", labels=list("abc"))
