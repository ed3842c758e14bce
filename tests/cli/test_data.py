"""`gptlab data`, as a user types it: what it prints, and one sentence and the right code for each thing that is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.config.compose import compose
from gptlab.data import pipeline, shard, work
from gptlab.data.prepare import prepare
from gptlab.data.tokenizer import ByteTokenizer
from tests.cli.conftest import Command, Result
from tests.conftest import sentences
from tests.data.conftest import forget_hub, hub  # noqa: F401
from tests.stand_ins.hub_server import Server, write_repository
from tests.tiny import tiny

SET = "owner/set"


def told(result: Result, code: int, pattern: str) -> str:
    """What is wrong, after checking that it is one sentence on standard error and that the code is right."""
    assert result.code == code, result.err
    assert "Traceback" not in result.out + result.err
    (line,) = result.err.strip().splitlines()
    assert line.startswith("gptlab: ")
    assert re.search(pattern, line), line
    return line


def text(file: Path, *more: str) -> list[str]:
    return ["data=text", f"data.corpus.path={file}", "data/tokenizer=byte", *more]


@pytest.fixture
def prepared(gptlab: Command, corpus_file: Path, empty_home: Path) -> Path:
    """A prepared folder."""
    assert gptlab("data", "prepare", *text(corpus_file)).code == 0
    (folder,) = (empty_home / "data").glob("text-*")
    return folder


# What it prints


def test_prepare_says_what_there_is_and_the_second_time_that_it_was_there(gptlab: Command, tmp_path: Path, empty_home: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [sentences(40), None, "", sentences(30, seed=1)]))
    first = gptlab("data", "prepare", *text(tmp_path / "a.jsonl"))
    assert first.code == 0, first.err
    made = prepare(compose(text(tmp_path / "a.jsonl")).data)
    for split in ("train", "val"):
        assert f"{made.manifest['splits'][split]['tokens']:,}" in first.out
    assert "byte, 257 tokens" in first.out
    assert "rows without text: 1 null, 1 empty" in first.out
    assert made.folder.name in first.out.replace("\n", "")
    assert "was there already" in gptlab("data", "prepare", *text(tmp_path / "a.jsonl")).out


def test_report_prints_figures_documents_and_rows(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    shown = gptlab("data", "report", *text(corpus_file), "model.context_length=32", "--documents", "1", "--rows", "2")
    assert shown.code == 0, shown.err
    for said in (
        "one document of 8,",
        "duplicates: 0 of 1",
        "held-out set val",
        "a few documents",
        "the first 2 training rows of 32 tokens",
    ):
        assert said in shown.out
    less = gptlab("data", "report", *text(corpus_file), "--documents", "0", "--rows", "0")
    assert "a few documents" not in less.out
    assert "training rows" not in less.out
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*map(sentences, range(1, 30)), sentences(7)]))
    several = gptlab("data", "report", *text(tmp_path / "a.jsonl"), "model.context_length=32")
    assert "a document has" in several.out
    assert "duplicates: 0 of 2" in several.out


def test_report_gives_json(gptlab: Command, corpus_file: Path) -> None:
    shown = gptlab("data", "report", *text(corpus_file), "--json", "data.packing=best_fit", "model.context_length=16")
    found = json.loads(shown.out)
    made = prepare(compose(text(corpus_file)).data)
    assert found["hash"] == made.hash
    assert found["tokenizer"]["name"] == "byte"
    (source,) = found["sources"]
    assert source["tokens"] == len(made.stream("train"))
    assert source["dropped"] > 0


@pytest.mark.parametrize("task", ["copy", "dyck"])
def test_report_of_a_task_shows_rows_and_its_best_loss(gptlab: Command, task: str) -> None:
    shown = gptlab("data", "report", f"data={task}", "model.context_length=64")
    assert shown.code == 0, shown.err
    assert "the best possible loss at context 64: 0.0000 nats" in shown.out
    assert "scored: " in shown.out
    found = json.loads(gptlab("data", "report", f"data={task}", "--json").out)
    assert found["tokenizer"]["name"] == "char"


def test_prepare_and_report_of_a_mix(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(sentences(60, seed=4))
    mix = ["data=mix", "data.tokenizer.vocabulary=300"]
    for name, file in {"small": tmp_path / "b.txt", "large": corpus_file}.items():
        mix += [f"+data/corpus@data.corpus.sources.{name}=text", f"data.corpus.sources.{name}.path={file}"]
    made = gptlab("data", "prepare", *mix, "+data.corpus.weights.large=3")
    assert made.code == 0, made.err
    assert re.search(r"large train .* 0\.750", made.out)
    shown = gptlab("data", "report", *mix, "+data.corpus.weights.large=3")
    assert "75.0% of the training tokens" in shown.out
    found = json.loads(gptlab("data", "report", *mix, "--json").out)
    assert [s["name"] for s in found["sources"]] == ["small", "large"]


def test_a_tokeniser_is_trained_where_data_look_for_it(gptlab: Command, corpus_file: Path, tmp_path: Path, empty_home: Path) -> None:
    bpe = ["data=text", f"data.corpus.path={corpus_file}", "data/tokenizer=bpe", "data.tokenizer.vocabulary=320"]
    made = gptlab("data", "tokenizer", "train", *bpe, "--json")
    assert made.code == 0, made.err
    found = json.loads(made.out)
    assert found["vocabulary"] == 320
    before = Path(found["file"]).stat().st_mtime_ns
    assert gptlab("data", "prepare", *bpe).code == 0
    assert list((empty_home / "tokenizers").iterdir()) == [Path(found["file"])]
    assert Path(found["file"]).stat().st_mtime_ns == before, "it was learned again"
    out = tmp_path / "mine.json"
    assert gptlab("data", "tokenizer", "train", *bpe, "--out", str(out)).code == 0
    assert json.loads(out.read_text()) == json.loads(Path(found["file"]).read_text())
    told(gptlab("data", "tokenizer", "train", *text(corpus_file)), 2, "data/tokenizer=byte has nothing to learn")
    told(gptlab("data", "tokenizer", "train", *bpe, "data.tokenizer.vocabulary=90000"), 2, r"vocabulary=90000: .*hold only [\d,]+ tokens")


def test_tokenisers_are_compared(gptlab: Command, corpus_file: Path, tmp_path: Path, tiktoken_cache: Path) -> None:
    bpe = ["data=text", f"data.corpus.path={corpus_file}", "data/tokenizer=bpe", "data.tokenizer.vocabulary=320"]
    file = tmp_path / "mine.json"
    made = gptlab("data", "tokenizer", "train", *bpe[:-1], "data.tokenizer.vocabulary=340", "--out", str(file))
    assert made.code == 0, made.err
    shown = gptlab("data", "tokenizer", "report", *bpe, "--compare", f"gpt2,byte,{file}", "--show", "the king reads")
    assert shown.code == 0, shown.err
    for name in ("bpe", "gpt2", "byte", "mine"):
        assert name in shown.out
    found = json.loads(gptlab("data", "tokenizer", "report", *bpe, "--compare", f"gpt2,{file}", "--json").out)
    assert [(f["name"], f["vocabulary"]) for f in found["tokenizers"]] == [("bpe", 320), ("gpt2", 50257), ("mine", 340)]
    told(gptlab("data", "tokenizer", "report", *bpe, "--compare", "gpt3"), 2, "gpt3.*gpt2")
    told(gptlab("data", "tokenizer", "report", *bpe, "--compare", str(tmp_path / "no.json")), 74, r"no\.json could not be read")


# What is wrong


@pytest.fixture
def server(hub: Server, tmp_path: Path) -> Server:  # noqa: F811
    sets = {"de": {"train": [f"Zeile {n} " * 20 for n in range(60)], "test": ["x"]}, "en": {"train": ["line"]}}
    hub.publish(SET, write_repository(tmp_path / "r", sets, files=1))
    return hub


def of_hub(*more: str, dataset: str = SET) -> list[str]:
    return ["data", "prepare", "data=hub", f"data.corpus.dataset={dataset}", "data.corpus.config=de", "data/tokenizer=byte",
            "data.corpus.held_out=1k", *more]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        (["data.corpus.dataset=owner/sett"], "the hub has no such data set"),
        (["data.corpus.column=body"], r"data\.corpus\.column=body: .* has the columns text, id, url"),
        (["data.corpus.split=trian"], r"data\.corpus\.split=trian: .* has the splits train, test \(did you mean train\?\)"),
        (["data.corpus.config=fr"], r"data\.corpus\.config=fr: .* configurations de, en"),
        (["data.corpus.tokens=0.5"], r"data\.corpus\.tokens=0\.5 is not an amount"),
    ],
    ids=["data set", "column", "split", "config", "tokens"],
)
def test_what_does_not_exist_is_told_with_what_does(gptlab: Command, server: Server, more: list[str], pattern: str) -> None:
    told(gptlab(*of_hub(), *more), 2, pattern)


def test_a_gated_set_without_a_token_is_told(gptlab: Command, server: Server, tmp_path: Path) -> None:
    server.publish("owner/gated", tmp_path / "r", members=frozenset({"hf_member"}))
    told(gptlab(*of_hub(dataset="owner/gated")), 2, "is gated: accept its terms at .*HF_TOKEN")
    forget_hub()


def test_no_network_says_what_would_serve_and_nothing_is_lost(
    gptlab: Command, server: Server, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 300)
    assert gptlab(*of_hub("data.corpus.tokens=500")).code == 0
    server.switch_off()
    assert gptlab(*of_hub("data.corpus.tokens=500")).code == 0, "what is prepared needs no network"
    told(gptlab(*of_hub("data.corpus.tokens=5k")), 74, "what was prepared is kept, and the same command goes on from there")
    told(gptlab(*of_hub("data.corpus.revision=" + "a" * 40, dataset="owner/new")), 74, "HF_ENDPOINT to a mirror, or use data=text")
    server.switch_on()
    assert gptlab(*of_hub("data.corpus.tokens=5k")).code == 0


def test_a_file_that_is_wrong_is_told(gptlab: Command, tmp_path: Path, empty_home: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    told(gptlab("data", "prepare", *text(tmp_path / "a.jsonl")), 2, r"a\.jsonl.* no column 'text'; there are body, id")
    told(gptlab("data", "prepare", *text(tmp_path / "a.txt.gz")), 3, r"a\.txt\.gz is damaged")
    told(gptlab("data", "prepare", *text(tmp_path / "b.txt")), 3, r"b\.txt is not UTF-8")
    told(gptlab("data", "prepare", *text(tmp_path / "c.txt")), 2, r"data\.corpus\.path=.*c\.txt: there is no such file or folder")
    assert not list(empty_home.glob("data/*/*"))


def _truncated(folder: Path) -> None:
    os.truncate(folder / "train-00000.bin", 10)


def _altered(folder: Path) -> None:
    content = bytearray((folder / "train-00000.bin").read_bytes())
    content[20] ^= 1
    (folder / "train-00000.bin").write_bytes(content)


def _missing(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()


def _another_tokeniser(folder: Path) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**written, "name": "char", "vocabulary": 1, "state": {"characters": "x"}}))


def _beyond(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["largest"] = 60_000
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (_truncated, r"train-00000\.bin has 10 bytes, its manifest says [\d,]+"),
        (_altered, r"train-00000\.bin has sha256 .*, its manifest says"),
        (_missing, r"train-00000\.bin is missing"),
        (_another_tokeniser, r"tokenizer\.json is char with sha256 .*, its manifest says byte with"),
        (_beyond, r"the token id 60000 is beyond the .*vocabulary of 257"),
    ],
)
@pytest.mark.parametrize("command", ["report", "train"])
def test_prepared_data_that_do_not_match_are_told(
    gptlab: Command, prepared: Path, corpus_file: Path, command: str, damage: Callable[[Path], None], pattern: str
) -> None:
    damage(prepared)
    arguments = ["data", "report", *text(corpus_file)] if command == "report" else ["train", *tiny(corpus_file, "data/tokenizer=byte")]
    assert f"delete {prepared} and run again" in told(gptlab(*arguments), 3, pattern)


def test_an_id_that_the_dtype_cannot_hold_is_told(
    gptlab: Command, corpus_file: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda _self, _text: np.array([70_000], np.uint32))
    told(gptlab("data", "prepare", *text(corpus_file)), 3, "token id 70000 does not fit uint16")


def test_a_validation_set_that_moved_is_told(gptlab: Command, corpus_file: Path, tmp_path: Path, empty_home: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("Etwas anderes, das nirgends sonst steht. " * 20)
    arguments = ["data", "prepare", *text(corpus_file, f"+data.validation.more={more}")]
    assert gptlab(*arguments).code == 0
    os.utime(more, ns=(5, 5))
    assert gptlab(*arguments).code == 0, "the same text under another date has not moved"
    more.write_text("Etwas ganz anderes, das auch nirgends steht. " * 20)
    told(gptlab(*arguments), 3, r"data\.validation\.more=.* has moved: its sha256 was .* and is .*; restore it")
    (pin,) = empty_home.glob("validation/*.json")
    pin.write_text("{")
    told(gptlab(*arguments), 3, str(pin))


@pytest.mark.parametrize("large", [False, True])
def test_a_full_disk_says_what_is_needed_and_keeps_much(
    gptlab: Command, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(sentences(3000))
    monkeypatch.setattr(pipeline, "UNIT", 10_000)
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", -1.0)
    if large:
        monkeypatch.setattr(work, "KEPT", 1000)
    plain: Any = shard.SplitWriter.write

    def full(self: shard.SplitWriter, ids: Any, starts: Any) -> None:
        if self.state.tokens > 60_000:
            raise OSError(28, "No space left on device")
        plain(self, ids, starts)

    with monkeypatch.context() as patch:
        patch.setattr(shard.SplitWriter, "write", full)
        line = told(gptlab("data", "prepare", *text(file)), 74, r"could not be written \(No space left on device\)")
    assert re.search(r"it needs about [\d,]+ bytes more", line)
    assert ("tokens written are kept, and the same command goes on from there" in line) == large
    assert bool(list(empty_home.glob("data/text-*/train-*.bin"))) == large
    assert gptlab("data", "prepare", *text(file)).code == 0


@pytest.mark.parametrize("overrides", [["data=copy"], ["data=pydocs"]])
def test_a_home_that_cannot_be_written_is_told(
    gptlab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "file"))
    told(gptlab("data", "prepare", *overrides), 74, "file")


def test_wrong_settings_are_told(gptlab: Command, corpus_file: Path) -> None:
    told(gptlab("data", "prepare", *text(corpus_file, "data.packing=tight")), 2, "concatenate, best_fit")
    told(gptlab("data", "prepare", *text(corpus_file, "data.filter.near_duplicates=7")), 2, r"data\.filter\.near_duplicates=7")
    told(gptlab("data", "prepare", "data=mix"), 2, r"data\.corpus\.sources is empty")
    told(gptlab("data", "prepare", "data=nothing"), 2, "pydocs")
    told(gptlab("data", "report", "data=copy", "data/tokenizer=byte"), 2, "needs data/tokenizer=char")


@pytest.mark.parametrize("fraction", ["1.5", "-0.1", "1", "0"])
def test_a_held_out_share_that_is_none_or_all_is_refused(gptlab: Command, corpus_file: Path, fraction: str) -> None:
    told(gptlab("data", "prepare", *text(corpus_file, f"data.validation_fraction={fraction}")), 2, r"data\.validation_fraction")
