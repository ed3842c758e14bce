"""Every token of a text is scored once, as the model alone would; what is added up is what stands in the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component
from gptlab.data.prepare import prepare
from gptlab.data.tokenizer import Tokenizer
from gptlab.evaluate.figures import figures
from gptlab.evaluate.losses import TokenLosses, of_set, of_text
from gptlab.model.transformer import Transformer, new_model
from gptlab.runner.run import Run
from tests.tiny import tiny

CONTEXT, TEXT = 8, "the king reads a small book, and the queen builds. "


def tokenizer(name: str, **options: Any) -> Tokenizer:
    made: Tokenizer = build(component("data/tokenizer", name).options(**options))
    made.fit([TEXT * 40])
    return made


def model(vocabulary: int, *more: str) -> Transformer:
    config = compose(["model=nano", "model.width=16", "model.heads=2", "model.depth=1", f"model.context_length={CONTEXT}", *more]).model
    made = new_model(config, vocabulary, seed=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # far from even odds
    return made


@torch.inference_mode()
def alone(made: Transformer, ids: list[int], stride: int) -> list[tuple[int, float]]:
    """(tokens before, loss) of every token but the first, each by a forward pass over its window alone."""
    found, start = [], 0
    for place in range(1, len(ids)):
        if place - start > CONTEXT:
            start += stride
        logits = made(torch.tensor([ids[start:place]]))[0, -1].double()
        found.append((place - start, float(F.cross_entropy(logits[None], torch.tensor([ids[place]])))))
    return found


@pytest.mark.parametrize("stride", [0, 1, 3, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 30])
def test_every_token_is_scored_once_in_its_window(stride: int, length: int) -> None:
    chars = tokenizer("char")
    made, text = model(chars.vocabulary), (TEXT * 2)[:length]
    found = of_text(made, chars, [text], stride=stride)
    expected = alone(made, chars.encode(text).tolist(), stride or CONTEXT)
    assert found.place.tolist() == [place for place, _ in expected]
    np.testing.assert_allclose(found.nats, [loss for _, loss in expected], atol=2e-5)
    assert found.token.tolist() == chars.encode(text).tolist()[1:]
    assert found.bytes == length - 1


def test_a_text_begins_behind_the_token_between_documents_where_there_is_one() -> None:
    by_byte = tokenizer("byte")
    made = model(257)
    one, two = of_text(made, by_byte, ["abc"]), of_text(made, by_byte, ["abc", "", "de"])
    assert one.token.tolist() == [97, 98, 99], "its first token is scored too"
    assert two.token.tolist() == [97, 98, 99, 100, 101]
    assert two.document.tolist() == [0, 0, 0, 2, 2]
    assert two.nats[:3].tolist() == pytest.approx(one.nats.tolist())
    assert of_text(made, by_byte, ["abc", "de"], limit=4).token.tolist() == [97, 98, 99, 100]


@pytest.mark.parametrize("name", ["char", "byte", "gpt2", "bpe"])
def test_bits_a_byte_are_the_nats_of_the_text_over_its_bytes(name: str, tiktoken_cache: Path) -> None:
    if name == "bpe":
        pytest.importorskip("rustbpe")
    made = tokenizer(name, **({"vocabulary": 290} if name == "bpe" else {}))
    text = "the queen builds a great book" if name == "char" else "größer: 日本語 😀, and the queen builds"
    if name == "char":
        text = "the queen builds a small book"
    ids = made.encode(text).tolist()
    begun = [*([] if made.end_of_text is None else [made.end_of_text]), *ids]
    of = model(made.vocabulary)
    nats = sum(loss for _, loss in alone(of, begun, CONTEXT))
    size = len(text.encode()) - (len(text[0].encode()) if made.end_of_text is None else 0)
    found = figures(of_text(of, made, [text]))
    assert found.bytes == size
    assert found.bits_per_byte == pytest.approx(nats / (size * math.log(2)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)


def test_the_model_is_not_told_apart_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from gptlab.interop.gpt2 import GPT2
    from gptlab.interop.shapes import imported

    settings = {"vocab_size": 257, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    config = GPT2.config(theirs.config.to_dict(), "config.json")
    ours = Transformer(config, 257).eval()
    ours.load_state_dict(imported(GPT2, config, 257, theirs.state_dict(), "here"))
    by_byte, stride = tokenizer("byte"), 5
    ids = torch.tensor([256, *by_byte.encode(TEXT * 3).tolist()])
    nats, scored = 0.0, 0
    for start in range(0, len(ids) - 1 - CONTEXT + stride, stride):
        window = ids[start : start + CONTEXT + 1]
        known = CONTEXT - stride if start else 0
        with torch.inference_mode():
            losses = F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="none")[known:]
        nats, scored = nats + float(losses.sum()), scored + len(losses)
    found = figures(of_text(ours, by_byte, [TEXT * 3], stride=stride))
    assert found.tokens == scored == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(nats / scored), rel=1e-4)


def test_a_held_out_set_has_the_loss_that_training_wrote_down(finished_run: Run) -> None:
    loaded = load(finished_run)
    data = prepare(loaded.config.data)
    found = figures(of_set(loaded.model, data, "val"))
    last = [m for m in finished_run.metrics() if "val/loss" in m][-1]
    assert found.loss == pytest.approx(last["val/loss"], abs=1e-6)
    assert found.bits_per_byte == pytest.approx(last["val/bits_per_byte"], abs=1e-6)


def test_what_the_loss_depends_on_is_told_by_hand() -> None:
    n = 1000
    token = np.array([0] * 500 + [1] * 495 + [2] * 5)
    made = TokenLosses(
        nats=np.where(token == 2, 9.0, 1.0), token=token, place=np.tile(np.arange(1, 11), 100), sure=np.full(n, 0.75),
        right=np.arange(n) % 2 == 0, document=np.repeat([0, 1], [100, 900]), bytes=2000,
    )  # fmt: skip
    found = figures(made)
    assert found.loss == pytest.approx((995 + 45) / 1000)
    assert found.bits_per_byte == pytest.approx(1040 / (2000 * math.log(2)))
    assert [(g.name, g.tokens) for g in found.by_place] == [("1", 100), ("2", 100), ("3 to 4", 200), ("5 to 8", 400), ("9 to 16", 200)]
    assert [(g.name, g.tokens, g.loss) for g in found.by_frequency] == [("from 1 %", 995, 1.0), ("0.1 % to 1 %", 5, 9.0)]
    assert [(g.name, g.tokens) for g in found.by_length] == [("64 to 255 tokens", 100), ("256 to 1,023 tokens", 900)]
    assert [(b.tokens, b.sure, b.right) for b in found.calibration] == [(n, 0.75, 0.5)]
    assert found.calibration_error == pytest.approx(0.25)


def test_what_cannot_be_measured_is_refused() -> None:
    chars = tokenizer("char")
    made = model(chars.vocabulary)
    for texts, stride, said in (
        (["t"], 0, r"there is nothing to measure: the text has fewer than two tokens"),
        ([], 0, r"there is nothing to measure"),
        ([TEXT], 9, r"--stride 9 must be from 1 to the context of 8"),
        ([TEXT], -1, r"--stride -1 must be"),
    ):
        with pytest.raises(ConfigError, match=said):
            of_text(made, chars, texts, stride=stride)


# The command


def test_runs_are_measured_side_by_side(corpus_file: Path, tmp_path: Path, gptlab: Callable[..., Any]) -> None:
    chars = train(compose(tiny(corpus_file, "study=judged"))).run
    by_byte = train(compose(tiny(corpus_file, "study=judged", "data/tokenizer=byte", "model.context_length=32"))).run
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the king sings and reads", "a small stone under the table")))
    shown = gptlab("evaluate", chars.identity, by_byte.identity, "--text", str(text))
    assert shown.code == 0, shown.err
    for words in ("on text.jsonl", "bits/byte", "by how many tokens came before", "by the length of the document", "how often rightly"):
        assert words in shown.out, words
    together = " ".join(shown.out.split())
    assert "different tokenisers: a loss is of a run's own tokens; compare bits/byte" in together
    assert "different contexts" in together
    told = json.loads(gptlab("evaluate", chars.identity, by_byte.identity, "--text", str(text), "--json", "--stride", "4").out)
    assert [one["text"] for one in told] == ["text.jsonl"] * 2
    assert told[0]["bytes"] == 24 + 29 - 2
    assert told[1]["bytes"] == 24 + 29
    own = gptlab("evaluate", "latest", "--precision", "int8")
    assert own.code == 0, own.err
    assert "on val" in own.out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--text", "nowhere.txt"], 2, "--text nowhere.txt: there is no such file"),
        (["--stride", "4"], 2, "--stride goes with --text"),
        (["--tokens", "-1"], 2, "--tokens -1 must be at least 0"),
        (["--precision", "fp64"], 2, "--precision fp64 is not one of fp32, bf16, int8"),
        (["--device", "tpu"], 2, "--device tpu: this machine has"),
        (["--text", "strange.txt"], 2, "the character 'ß'"),
        (["--checkpoint", "7"], 5, "no checkpoint of step 7"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    more: list[str], code: int, said: str, finished_run: Run, gptlab: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("strange.txt").write_text("ß")
    found = gptlab("evaluate", finished_run.identity, *more)
    assert (found.code, found.out.strip()) == (code, "")
    assert said in found.err
    assert len(found.err.strip().splitlines()) == 1
