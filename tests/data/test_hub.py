"""The hub as a corpus: every row once and in order whatever breaks, from a commit that stays; and each refusal says what would help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import component
from gptlab.data import hub as module
from gptlab.data import hub_rows
from gptlab.data.hub import Hub
from gptlab.data.reader import Piece
from tests.data.conftest import forget_hub
from tests.stand_ins.hub_server import COMMIT, Server, hub_server, write_repository

NAME, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
TEXTS: list[str | None] = [f"document {i}: " + "größer und kleiner, " * (i % 7 + 1) for i in range(60)]
TEXTS[3], TEXTS[4], TEXTS[5], TEXTS[59] = None, "", " \n\t", None
LATER = "b" * 40


def pieces(texts: list[str | None]) -> list[Piece]:
    """What a corpus should make of the rows."""
    return [Piece(t, True) if t and t.strip() else Piece("", True, "null" if t is None else "empty") for t in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = {CONFIG: {"train": TEXTS, "validation": TEXTS[10:20]}, "default": {"train": TEXTS[:10]}}
    return write_repository(tmp_path_factory.mktemp("repository"), sets, row_group=7)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of JSON lines, of more rows than are read at once."""
    return write_repository(tmp_path_factory.mktemp("lines"), {"default": {"train": TEXTS * 20}}, files=2, suffix=".jsonl")


@pytest.fixture
def server(hub: Server, folder: Path) -> Server:
    """A hub with the data set."""
    hub.publish(NAME, folder)
    return hub


def corpus(**options: Any) -> Hub:
    return Hub(**{"dataset": NAME, "config": CONFIG, **options})


def all_rows(made: Hub, cursor: Any = None) -> list[tuple[Piece, Any]]:
    return list(made.pieces_from(cursor))


def drain(stream: Iterator[tuple[Piece, Any]], into: list[tuple[Piece, Any]]) -> None:
    """Take what comes until it ends or raises."""
    for row in stream:
        into.append(row)


def test_rows_are_documents_in_order_and_those_without_text_say_why(server: Server) -> None:
    made = corpus(validation_split="validation")
    assert list(made.pieces()) == pieces(TEXTS)
    assert [p for p, _ in made.validation_pieces_from(None)] == pieces(TEXTS[10:20])
    assert made.validation is not None
    assert list(made.validation.pieces()) == pieces(TEXTS[10:20])
    assert list(corpus(config="default").pieces()) == pieces(TEXTS[:10])
    assert list(corpus().validation_pieces_from(None)) == []


def test_bytes_that_are_no_text_are_skipped_and_their_neighbours_kept(server: Server, tmp_path: Path) -> None:
    place = write_repository(tmp_path / "r", {"default": {"train": ["x"]}}, files=1)
    text = pa.array([b"good", b"\xed\xa0\x80 lone surrogate", None, "gut: ö".encode()]).view(pa.string())
    pq.write_table(pa.table({"text": text}), place / "default/train/000_00000.parquet")
    server.publish("owner/bytes", place)
    found = list(Hub(dataset="owner/bytes").pieces())
    assert found == [Piece("good", True), Piece("", True, "broken"), Piece("", True, "null"), Piece("gut: ö", True)]


@pytest.mark.parametrize("kind", ["parquet", "lines"])
def test_any_cut_resumes_exactly_while_requests_fail(server: Server, lines: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(hub_rows, "BLOCK", 1 << 10)  # many requests a file
    monkeypatch.setattr(hub_rows, "BATCH", 300)
    server.publish("owner/lines", lines)
    made = corpus() if kind == "parquet" else Hub(dataset="owner/lines")
    whole = all_rows(made)
    texts = TEXTS if kind == "parquet" else TEXTS * 20
    assert [p for p, _ in whole] == pieces(texts)
    for cut in range(len(texts)) if kind == "parquet" else (0, 254, 255, 256, 511, 599, 600, 700, 1000, 1198, 1199):
        cursor = json.loads(json.dumps(whole[cut][1]))
        server.faults.unavailable, server.faults.drops = cut % 3, deque([cut * 37 % 1000, 0][: cut % 4])
        rest = all_rows(made, cursor)
        assert [p for p, _ in rest] == pieces(texts[cut + 1 :]), f"cut behind row {cut}"
        if kind == "parquet":
            assert rest == whole[cut + 1 :], "the cursors are the same too"


@pytest.mark.parametrize("at", [1, 8, 25, 33])
def test_a_stream_that_breaks_beyond_the_clients_patience_is_opened_anew(server: Server, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(hub_rows, "BLOCK", 1 << 10)
    monkeypatch.setattr(hub_rows, "AHEAD", 1)
    stream = corpus().pieces_from(None)
    found = [next(stream) for _ in range(at)]
    server.faults.unavailable = 8  # the client asks six times
    found += stream
    assert server.faults.unavailable == 0
    assert [p for p, _ in found] == pieces(TEXTS)


@pytest.mark.parametrize("fault", ["unavailable", "off"])
def test_an_outage_in_mid_stream_says_that_nothing_is_lost_and_nothing_is(
    server: Server, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(hub_rows, "BLOCK", 1 << 10)
    monkeypatch.setattr(hub_rows, "AHEAD", 1)
    made = corpus()
    stream, found = made.pieces_from(None), list[tuple[Piece, Any]]()
    found += islice(stream, 10)
    if fault == "off":
        server.switch_off()
    server.faults.unavailable = 10**6
    with pytest.raises(IOFailure, match="what was prepared is kept, and the same command goes on from there") as told:
        drain(stream, found)
    assert told.value.code == 74
    assert NAME in str(told.value)
    assert server.url in str(told.value)
    assert 10 <= len(found) < len(TEXTS)
    if fault == "off":
        with pytest.raises(IOFailure, match=f"{NAME} .*what was prepared is kept"):
            all_rows(corpus(), found[-1][1])
        server.switch_on()
    server.faults.unavailable = 0
    found += corpus().pieces_from(json.loads(json.dumps(found[-1][1])))
    assert [p for p, _ in found] == pieces(TEXTS)


def test_going_on_reads_neither_earlier_files_nor_earlier_row_groups(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_rows, "BLOCK", 1)
    monkeypatch.setattr(hub_rows, "BATCH", 1)
    made = corpus()
    whole = all_rows(made)
    server.requests.clear()
    cursor = whole[37][1]  # the second file's last group of rows
    assert (cursor["file"], cursor["group"], cursor["row"]) == (1, 2, 4)
    assert all_rows(made, cursor) == whole[38:]
    second = [r for r in server.data_requests() if r.path.endswith("001_00000.parquet")]
    assert not any(r.path.endswith("000_00000.parquet") for r in server.data_requests())
    with pq.ParquetFile(next(iter(server.repositories.values())).commits[COMMIT] / cursor["path"]) as parquet:
        begins = parquet.metadata.row_group(2).column(0).dictionary_page_offset
        ends = parquet.metadata.row_group(0).column(0).data_page_offset
    starts = [int(r.range.removeprefix("bytes=").split("-")[0]) for r in second if r.range]
    assert starts
    assert not any(ends <= s < begins for s in starts), "no byte between the first group of rows and the one in question"


def test_a_row_group_is_decoded_in_small_batches(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str | None] = [f"{i:08d}" * 50 for i in range(400)]  # one row group of 160,000 bytes
    server.publish("owner/large", write_repository(tmp_path / "r", {"default": {"train": texts}}, files=1, row_group=400))
    monkeypatch.setattr(hub_rows, "BATCH", 4000)
    made = Hub(dataset="owner/large")
    sizes = [len(batch.values) for batch in made._reader("train")(None)]
    assert sum(sizes) == 400
    assert max(sizes) <= 10


def test_closing_a_stream_early_ends_its_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_rows, "AHEAD", 1)
    monkeypatch.setattr(hub_rows, "BATCH", 1)
    before = threading.active_count()
    stream = corpus().pieces_from(None)
    next(stream)
    reading = [t for t in threading.enumerate() if t.name.startswith("gptlab")]
    assert len(reading) == 1
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 2
    assert not reading[0].is_alive()
    assert threading.active_count() <= before + 1  # the server's own, of the connection that stays open


def test_the_commit_is_asked_for_once_and_the_data_stays(server: Server, tmp_path: Path, empty_home: Path) -> None:
    first = corpus().fingerprint()
    assert first == {
        "dataset": NAME, "config": CONFIG, "split": "train", "column": "text", "revision": COMMIT,
        "held_out": 4_000_000, "validation_split": "",
    }  # fmt: skip
    pin = empty_home / "hub" / "HuggingFaceFW--fineweb-edu.json"
    assert json.loads(pin.read_text())["commit"] == COMMIT
    assert [f.name for f in pin.parent.iterdir()] == [pin.name], "nothing half-written stays"
    server.publish(NAME, write_repository(tmp_path / "r", {CONFIG: {"train": ["newer"]}}, files=1), LATER)
    assert [p.text for p, _ in all_rows(corpus())] == [p.text for p in pieces(TEXTS)], "the hub has moved on, the data has not"
    assert [p.text for p, _ in all_rows(corpus(revision=LATER))] == ["newer"]
    server.switch_off()
    asked = len(server.requests)
    assert corpus(tokens="1M").fingerprint() == first, "known without a network, and the same folder for more tokens"
    assert corpus(revision=LATER).fingerprint()["revision"] == LATER
    assert len(server.requests) == asked
    server.switch_on()
    pin.unlink()
    assert corpus().fingerprint()["revision"] == LATER


def test_a_pin_that_is_damaged_or_gone_from_the_hub_says_so(server: Server, empty_home: Path) -> None:
    pin = empty_home / "hub" / "HuggingFaceFW--fineweb-edu.json"
    pin.parent.mkdir(parents=True)
    for damage in ("{", "[]", '{"commit": 5}', '{"commit": "main"}'):
        pin.write_text(damage)
        with pytest.raises(DataError, match=r"HuggingFaceFW--fineweb-edu\.json .*; delete it to pin the newest"):
            corpus().fingerprint()
    pin.write_text(json.dumps({"commit": "c" * 40}))
    with pytest.raises(ConfigError, match=r"has no such revision, which .*fineweb-edu\.json holds; delete that file"):
        all_rows(corpus())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"dataset": "HuggingFaceFW/fineweb-eduu"},
            r"dataset=HuggingFaceFW/fineweb-eduu: the hub has no such data set.*spelling.*HF_TOKEN",
        ),
        ({"config": "sample-10B"}, r"config=sample-10B: .*configurations sample-10BT, default \(did you mean sample-10BT\?\)"),
        ({"split": "trian"}, r"split=trian: .*splits train, validation \(did you mean train\?\)"),
        ({"validation_split": "test"}, r"validation_split=test: .*splits train, validation"),
        ({"column": "texts"}, r"column=texts: .*columns text, id, url, .*\(did you mean text\?\)"),
        ({"column": "score"}, r"column=score: it holds double, not text; .* has text in text, id, url"),
        ({"revision": "v7"}, r"revision=v7: HuggingFaceFW/fineweb-edu has no such revision"),
    ],
)
def test_what_the_hub_does_not_have_is_named_with_what_it_has(server: Server, options: dict[str, str], says: str) -> None:
    made = corpus(**options)
    with pytest.raises(ConfigError, match=says) as told:
        list(made.validation_pieces_from(None) if "validation_split" in options else made.pieces())
    assert told.value.code == 2
    assert str(told.value).startswith("data.corpus.")


def test_a_gated_data_set_is_given_to_members_only(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("owner/gated", folder, members=frozenset({"hf_member"}))
    for token in ("", "hf_stranger"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError, match=r"accept its terms at https://huggingface\.co/datasets/owner/gated, .*HF_TOKEN"):
            all_rows(Hub(dataset="owner/gated"))
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    forget_hub()
    assert [p for p, _ in all_rows(Hub(dataset="owner/gated"))] == pieces(TEXTS[:10])


def test_a_hub_that_cannot_be_asked_is_told_with_what_serves_instead(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"what is prepared already needs no network; else set HF_ENDPOINT to a mirror, or use data=text data\.corpus\.path=FILE"
    server.switch_off()
    with pytest.raises(IOFailure, match=f"could not be had from {server.url} .*{said}"):
        corpus().fingerprint()
    with pytest.raises(IOFailure, match=said):
        all_rows(corpus(revision=COMMIT))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "ASK_WAITS", (60.0,))  # not to be waited for
    with pytest.raises(IOFailure, match=f"since HF_HUB_OFFLINE is set: unset it; {said}") as told:
        corpus().fingerprint()
    assert told.value.code == 74


def test_a_folder_of_the_same_name_is_not_taken_for_the_data_set(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(tmp_path / NAME, {CONFIG: {"train": ["mine"]}}, files=1)
    monkeypatch.chdir(tmp_path)
    assert [p for p, _ in all_rows(corpus())] == pieces(TEXTS)


def test_a_copy_of_another_commit_never_stands_in_for_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.load_dataset(NAME, CONFIG, split="validation", revision=COMMIT, cache_dir=str(datasets.config.HF_DATASETS_CACHE))
    made = corpus(split="validation")
    made.fingerprint()
    monkeypatch.setattr(made, "_ask", lambda: COMMIT)
    server.switch_off()
    with pytest.raises(IOFailure, match="could not be had"):
        all_rows(made)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_broken_file_is_named(server: Server, tmp_path: Path, damage: str) -> None:
    place = write_repository(tmp_path / "r", {"default": {"train": [f"row {i} " * 99 for i in range(60)]}}, files=1)
    file = place / "default/train/000_00000.parquet"
    content = bytearray(file.read_bytes())
    content[40:400] = bytes(360) if damage == "flipped" else b""
    file.write_bytes(content if damage == "flipped" else content[:-20])
    server.publish("owner/broken", place)
    with pytest.raises(DataError, match=r"default/train/000_00000\.parquet is not a sound parquet file") as told:
        all_rows(Hub(dataset="owner/broken"))
    assert told.value.code == 3


def test_the_options_are_read_with_their_units() -> None:
    made = corpus(tokens="1.5B", held_out="250k")
    assert (made.limit, made.held_out_characters, made.name) == (1_500_000_000, 250_000, "fineweb-edu-sample-10bt")
    made = corpus(config="", tokens="", validation_split="validation")
    assert (made.limit, made.held_out_characters, made.name) == (None, 0, "fineweb-edu")
    with pytest.raises(ConfigError, match=r"data\.corpus\.tokens=abc .*100M"):
        corpus(tokens="abc")
    with pytest.raises(ConfigError, match=r"data\.corpus\.held_out=0 .*100M"):
        corpus(held_out="0")
    with pytest.raises(ConfigError, match="dataset=fineweb is not of the form OWNER/NAME"):
        corpus(dataset="fineweb")
    with pytest.raises(ConfigError, match="validation_split=train is the split that is trained on"):
        corpus(validation_split="train")


@pytest.mark.parametrize(
    "name", ["climbmix", "fineweb2_de", "fineweb_edu", "onemillionposts", "openwebtext", "wikipedia_de", "wikivoyage_de", "youtubecommons"]
)
def test_a_preset_is_a_choice_of_options(name: str) -> None:
    file = Path(__file__).parents[2] / "conf" / "data" / "corpus" / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert text.startswith("# ")
    assert values.pop("defaults") == ["hub", "_self_"]
    assert component("data/corpus", "hub").factory(**values).dataset == values["dataset"]


CLIENT = """
import json, sys
from gptlab.data.hub import Hub
assert "datasets" not in sys.modules and "pyarrow" not in sys.modules, "importing is cheap"
made = Hub(dataset=sys.argv[1], config=sys.argv[2])
print(json.dumps([piece.text for piece in made.pieces()]))
"""


def test_a_process_of_its_own_reads_from_the_endpoint_in_silence(tmp_path: Path) -> None:
    screen, terminal = os.openpty()  # bars are shown to terminals only
    with hub_server() as made:
        made.publish(NAME, write_repository(tmp_path / "r", {CONFIG: {"train": TEXTS}}, files=20))
        made.faults.drops = deque([100])
        own = {"HF_HOME": str(tmp_path / "hf"), "GPTLAB_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": made.url}
        called = [sys.executable, "-c", CLIENT, NAME, CONFIG]
        place = Path(__file__).parents[2]
        ended = subprocess.run(called, env=os.environ | own, cwd=place, stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=60)
        assert not made.faults.drops
    os.write(terminal, b".")
    assert os.read(screen, 1 << 16) == b".", "no bars, no warnings"
    os.close(screen)
    os.close(terminal)
    assert json.loads(ended.stdout) == [p.text for p in pieces(TEXTS)]
