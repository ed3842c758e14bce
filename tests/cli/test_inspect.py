"""`gptlab inspect`: the page says what the model computes, the terminal the key facts, and what does not fit is refused in a sentence."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab import compose, train
from gptlab.cli import inspect as inspect_module
from gptlab.config.errors import ConfigError
from gptlab.interpret import capture, tune_lens
from gptlab.interpret.units import excited
from gptlab.runner.load import load
from gptlab.runner.run import Run
from gptlab.study.inspection_page import MOST_BYTES, packed_patterns
from tests.browser import browser
from tests.cli.conftest import Command
from tests.data.test_conversations import chats, written
from tests.tiny import tiny

PROMPT = "the king sings"


def data_of(file: Path) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    read: dict[str, Any] = json.loads(found)
    return read


def numbers(text: str, kind: str = "<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_page_holds_what_the_model_computes(finished_run: Run, gptlab: Command, tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    done = gptlab("inspect", str(finished_run.directory), "--prompt", PROMPT, "--output", str(file))
    assert done.code == 0, done.err
    assert f"page: {file}" in done.out.replace("\n", "")
    for said in (
        "Mean loss",
        "Lens depth",
        "Strongest previous-token heads: layer 0 head",
        "No induction head: the best has 0.0",
        "computed by model/kernel=naive",
    ):
        assert said in done.out, said
    data, run = data_of(file), load(str(finished_run.directory))
    ids = run.tokenizer.encode(PROMPT).tolist()
    assert [data["pieces"][i] for i in data["tokens"]] == list(PROMPT)
    with torch.no_grad():
        told = run.model(torch.tensor(ids)[None])[0].log_softmax(-1)
    assert numbers(data["loss"]) == pytest.approx([-float(told[i, token]) for i, token in enumerate(ids[1:])], abs=1e-5)
    best = [data["pieces"][i] for i in numbers(data["guesses"]["piece"], "<u4")[:: data["guesses"]["k"]]]
    assert best == [run.tokenizer.decode([int(i)]) for i in told.argmax(-1)]
    last = numbers(data["lens"]["kinds"]["logit lens"]["top"], "<u4")[-len(ids) :]
    assert [data["pieces"][i] for i in last] == best, "the last row of the lens is the model"
    pattern = capture(run.model, torch.tensor(ids), "blocks.0.attention.pattern")["blocks.0.attention.pattern"][0].numpy()
    (layer,) = data["attention"]["layers"]
    raw = np.frombuffer(zlib.decompress(base64.b64decode(layer["data"])), np.uint8).reshape(2, -1)
    weights = (raw / data["attention"]["steps"]) ** 2
    rows, columns = np.tril_indices(len(ids))
    assert np.abs(weights - pattern[:, rows, columns]).max() < 1 / 255
    told_by = numbers(data["attribution"]["values"]).reshape(len(ids), -1).sum(-1)
    aims = [*ids[1:], int(told[-1].argmax())]
    with torch.no_grad():
        logits = run.model(torch.tensor(ids)[None])[0]
    assert told_by == pytest.approx([float(logits[i, aim]) for i, aim in enumerate(aims)], abs=1e-4)
    assert {u["unit"] for u in data["neurons"]["layers"][0]["units"]} <= set(range(64))
    assert data["neurons"]["layers"][0]["units"][0]["texts"], "held-out text was looked through"
    assert data["neighbours"]["near"][0]["near"][0][1] <= 1


def test_a_text_of_its_own_a_tuned_lens_and_an_analogy(finished_run: Run, gptlab: Command, tmp_path: Path, corpus_file: Path) -> None:
    file = tmp_path / "page.html"
    more = ["--tuned-lens", "--text", str(corpus_file), "--tokens", "256", "--analogy", "t - h + e", "--output", str(file)]
    done = gptlab("inspect", str(finished_run.directory), *more)
    assert done.code == 0, done.err
    data = data_of(file)
    begins = "".join(data["pieces"][i] for i in data["tokens"])
    assert corpus_file.read_text(encoding="utf-8").startswith(begins), "no prompt: the beginning of that text"
    assert list(data["lens"]["kinds"]) == ["logit lens", "tuned lens"]
    assert "256 tokens of small.txt" in data["neurons"]["note"]
    assert data["neighbours"]["analogies"][0]["asked"] == "t - h + e"


def test_held_out_text_is_read_where_no_prompt_is_given_and_the_file_is_named_after_the_run(
    finished_run: Run, gptlab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gptlab("inspect", "latest").code == 0
    (page,) = tmp_path.glob("inspect-*.html")
    assert page.name == f"inspect-shown-{finished_run.identity}.html"
    data = data_of(page)
    assert len(data["tokens"]) == 16, "a context"
    assert any("No prompt was given" in remark["text"] for remark in data["remarks"])
    assert gptlab("inspect", "latest").code == 0, "its own page may be replaced"


def test_what_is_no_such_page_is_not_overwritten(finished_run: Run, gptlab: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    asked = ["inspect", "latest", "--prompt", PROMPT, "--output", str(tmp_path / "mine.html")]
    refused = gptlab(*asked)
    assert refused.code == 2
    assert "is no page of gptlab inspect" in refused.err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert gptlab(*asked, "--force").code == 0


def test_an_unfinished_run_is_shown_from_its_newest_checkpoint_and_says_so(finished_run: Run, gptlab: Command, tmp_path: Path) -> None:
    (finished_run.directory / "done.json").unlink()
    shutil.rmtree(finished_run.checkpoints / "step-000000012")
    done = gptlab("inspect", "latest", "--prompt", PROMPT, "--output", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    assert "This run is not done (stopped): it is shown as it was at step 8 of 12steps." in done.out
    assert data_of(tmp_path / "page.html")["remarks"][0]["warn"]


def test_the_lens_is_shown_on_a_row_that_it_has_not_seen(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, gptlab: Command, tmp_path: Path
) -> None:
    asked: list[torch.Tensor] = []

    def tuned(model: Any, rows: torch.Tensor, **more: Any) -> Any:
        asked.append(rows)
        return tune_lens(model, rows, steps=1, **more)

    monkeypatch.setattr(inspect_module, "tune_lens", tuned)
    page = tmp_path / "page.html"
    for tokens, prompt, count in ((64, [], 3), (16, [], 1), (64, ["--prompt", PROMPT], 4)):
        done = gptlab("inspect", "latest", "--tuned-lens", "--tokens", str(tokens), *prompt, "--output", str(page))
        assert done.code == 0, done.err
        assert len(asked[-1]) == count
        told = any("shown on the text that it learned from" in remark["text"] for remark in data_of(page)["remarks"])
        assert told == (count == 1)
    shown = [data_of(page)["pieces"][i] for i in data_of(page)["tokens"]]
    assert "".join(shown) == PROMPT
    assert torch.equal(asked[0], asked[2][1:])


def test_of_packed_chats_the_first_is_the_prompt_and_none_sees_another(
    gptlab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny(written(tmp_path, chats(60, turns=1, longest=3)), "objective=sft", steps=1)
    swapped = {"data=text": "data/corpus=chat", "data/tokenizer=char": "data/tokenizer=chat"}
    train(compose([*(swapped.get(o, o) for o in own), "model.context_length=128", "trainer.batch_tokens=256"]))
    given: list[torch.Tensor] = []

    def looked(*arguments: Any, document: torch.Tensor, **more: Any) -> Any:
        given.append(document)
        return excited(*arguments, document=document, **more)

    monkeypatch.setattr(inspect_module, "excited", looked)
    done = gptlab("inspect", "latest", "--tokens", "256", "--output", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    data = data_of(tmp_path / "page.html")
    first = int((given[0][0] == given[0][0, 0]).sum())
    assert given[0].unique().numel() > 1
    assert len(data["tokens"]) == min(64, first)
    assert "".join(data["pieces"][i] for i in data["tokens"]).count("<|user|>") <= 1


def test_a_context_without_room_for_scores_and_a_unit_without_texts_have_a_page(corpus_file: Path, gptlab: Command, tmp_path: Path) -> None:
    train(compose(tiny(corpus_file, "model.context_length=3", "trainer.batch_tokens=63", "model/ffn=relu2", steps=1)))
    done = gptlab("inspect", "latest", "--prompt", "the", "--tokens", "3", "--output", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    assert "No scores of heads: 1 different tokens, twice, do not fit model.context_length=3" in done.out
    data = data_of(tmp_path / "page.html")
    assert len(data["attention"]["layers"]) == 1
    assert data["attention"]["scores"] == {"note": data["attention"]["scores"]["note"]}
    data["neurons"]["layers"][0]["units"][0]["texts"] = []
    page_text = (tmp_path / "page.html").read_text(encoding="utf-8")
    start = page_text.index(">", page_text.index('<script type="application/json" id="data"')) + 1
    (tmp_path / "page.html").write_text(
        page_text[:start] + json.dumps(data) + page_text[page_text.index("</script>", start) :], encoding="utf-8"
    )
    with browser(tmp_path / "profile") as page:
        page.look(390, 800)
        page.go((tmp_path / "page.html").as_uri())
        page.until("document.documentElement.dataset.ready === 'true'")
        assert "Nothing in its held-out text excites it." in page.evaluate("document.getElementById('neurons').textContent")
        heads = page.evaluate("[...document.querySelectorAll('#attribution thead th')].map((cell) => cell.textContent).join()")
        assert heads.startswith("written by,sum,head 0,head 1,")
        rows = page.evaluate(
            "[...document.querySelectorAll('#attribution tbody tr')].map((r) => r.cells[0].textContent + r.cells[1].textContent).join()"
        )
        assert re.search(r"embedding[+−]\d", rows), "what is no layer's stands there too"
        box = "document.getElementById('attribution')"
        page.evaluate(f"{box}.scrollLeft = 200")
        assert page.evaluate(f"{box}.querySelector('tbody th').getBoundingClientRect().left >= {box}.getBoundingClientRect().left - 1")
        assert page.complaints() == []


def test_an_autoencoder_is_opened_with_the_weights_that_are_asked_for(
    finished_run: Run, gptlab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []

    def opened(loaded: object, **more: str) -> None:
        asked.append(more)
        raise ConfigError("far enough")

    monkeypatch.setattr(inspect_module, "has_autoencoder", lambda loaded: True)
    monkeypatch.setattr(inspect_module, "autoencoder", opened)
    assert "far enough" in gptlab("inspect", "latest", "--prompt", PROMPT, "--weights", "trained").err
    assert asked == [{"checkpoint": "latest", "weights": "trained"}]


def test_a_mixture_has_units_that_are_not_shown(corpus_file: Path, gptlab: Command, tmp_path: Path) -> None:
    train(compose(tiny(corpus_file, "model/ffn=moe", steps=1)))
    assert gptlab("inspect", "latest", "--prompt", PROMPT, "--output", str(tmp_path / "page.html")).code == 0
    assert data_of(tmp_path / "page.html")["neurons"]["note"] == "The units of a mixture's experts are not shown."


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["model.depth=0"], "a bigram"),
        (["model/attention=average"], "weighs all tokens so far alike"),
        (["model/position=alibi", "model/ffn=none"], "adds to the scores"),
        (["model/position=rotary", "model/kernel=naive", "model/block=sandwich"], "turns queries and keys"),
    ],
)
def test_every_kind_of_model_has_a_page_that_says_what_it_lacks(
    corpus_file: Path, gptlab: Command, tmp_path: Path, parts: list[str], said: str
) -> None:
    train(compose(tiny(corpus_file, *parts, steps=1)))
    done = gptlab("inspect", "latest", "--prompt", PROMPT, "--output", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    data = data_of(tmp_path / "page.html")
    notes = data["attention"]["note"] + data["positions"]["note"] + str(data["neurons"]["note"])
    assert said in notes
    with browser(tmp_path / "profile") as page:
        page.go((tmp_path / "page.html").as_uri())
        page.until("document.documentElement.dataset.ready === 'true'")
        assert page.complaints() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "the king sings and reads under the table"], "has 40 tokens, more than model.context_length=16"),
        (["--prompt", "t"], "is one token; a page needs at least two"),
        (["--prompt", ""], "the prompt is '', which has no token"),
        (["--prompt", "the", "--prompt-file", "x"], "--prompt and --prompt-file: one of them"),
        (["--prompt", "the", "--text", "nowhere.txt"], "--text nowhere.txt: there is no such file"),
        (["--prompt", "the", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--prompt", "the", "--device", "tpu"], "--device tpu: this machine has"),
        (["--prompt", "the", "--analogy", "king"], "'king' is"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(finished_run: Run, gptlab: Command, arguments: list[str], said: str) -> None:
    refused = gptlab("inspect", "latest", *arguments)
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.splitlines()) == 1


def test_a_plugin_that_is_missing_is_named(finished_run: Run, gptlab: Command) -> None:
    file = finished_run.directory / "config.json"
    config = json.loads(file.read_text())
    config["config"]["model"]["norm"] = {"name": "maxnorm"}
    file.write_text(json.dumps(config))
    refused = gptlab("inspect", "latest", "--prompt", PROMPT)
    assert refused.code == 2
    assert "maxnorm" in refused.err
    assert "--plugin" in refused.err


def test_patterns_too_many_for_the_page_are_told_in_fewer_steps() -> None:
    draw = np.random.default_rng(0)
    weights = [np.tril(draw.random((12, 256, 256), np.float32)) for _ in range(12)]  # noise: nothing compresses worse
    weights = [w / w.sum(-1, keepdims=True) for w in weights]
    made, steps = packed_patterns(weights)
    assert sum(map(len, made)) <= MOST_BYTES
    assert steps == 63, "small weights take few of the steps, so that noise fits"
    few, fine = packed_patterns(weights[:1])
    assert fine == 255
    assert len(few[0]) < len(weights[0][0]) ** 2 * 12


def test_a_page_of_twelve_layers_of_twelve_heads_over_256_tokens_stays_under_five_megabytes(
    corpus_file: Path, gptlab: Command, tmp_path: Path
) -> None:
    parts = ["model.width=48", "model.depth=12", "model.heads=12", "model.context_length=256", "trainer.batch_tokens=256"]
    train(compose(tiny(corpus_file, *parts, steps=1)))
    prompt = corpus_file.read_text(encoding="utf-8")[:256]
    done = gptlab("inspect", "latest", "--prompt", prompt, "--output", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    assert len(data_of(tmp_path / "page.html")["attention"]["layers"]) == 12
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_the_page_in_a_browser_by_mouse_and_by_keyboard(finished_run: Run, gptlab: Command, tmp_path: Path) -> None:
    assert gptlab("inspect", "latest", "--prompt", PROMPT, "--output", str(tmp_path / "page.html")).code == 0
    with browser(tmp_path / "profile") as page:
        page.look(1280, 900)
        page.go((tmp_path / "page.html").as_uri())
        page.until("document.documentElement.dataset.ready === 'true'")
        told = "document.querySelector('#guesses h3').textContent"
        assert page.evaluate(told).startswith("After token 12, g")
        page.click("#text .token:nth-child(3)")
        assert page.evaluate(told).startswith("After token 2, e: then comes ␣")
        page.press("ArrowRight")
        assert page.evaluate(told).startswith("After token 3, ␣: then comes k")
        assert page.evaluate("document.querySelector('#lens td.chosen').cellIndex") == 4
        assert "After token 3" in page.evaluate("document.getElementById('attribution-note').textContent")
        page.click(".thumb:nth-child(2)")
        page.until("document.getElementById('head-name').textContent.startsWith('layer 0, head 1')")
        page.press("ArrowLeft")
        page.until("document.getElementById('head-name').textContent.startsWith('layer 0, head 0')")
        page.evaluate("document.getElementById('pattern').focus()")
        page.press("ArrowDown")
        shown = page.until("!document.getElementById('tip').hidden && document.getElementById('tip').textContent")
        run = load(str(finished_run.directory))
        pattern = capture(run, PROMPT, "blocks.0.attention.pattern")["blocks.0.attention.pattern"][0, 0]
        query, key = (int(n) for n in re.findall(r"\((\d+)\)", shown))
        assert float(shown.rpartition(" ")[2]) == pytest.approx(float(pattern[query, key]), abs=0.005)
        page.press("Enter")
        page.until(f"{told}.startsWith('After token {query}')")
        page.look(390, 800, dark=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than a phone"
        assert page.complaints() == []
        assert {a.partition(":")[0] for a in page.requested()} == {"file"}, "no network"
