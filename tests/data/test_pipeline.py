"""A preparation that stops anywhere, however it stops, goes on to write what an undisturbed one writes, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from gptlab.config.errors import DataError, IOFailure
from gptlab.config.registry import component
from gptlab.config.schema import DataConfig, FilterConfig
from gptlab.data import pipeline, prepared, reader, shard, work
from gptlab.data.filter import Filter
from gptlab.data.pipeline import Encoder, Section, write_section
from gptlab.data.prepare import Progress, prepare
from gptlab.data.reader import Piece
from gptlab.data.shard import SplitState, SplitWriter, TokenStream
from gptlab.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from tests.data.test_shard import config_of

ALPHABET = "abcdefg  ..\n"
UNIT = 40


class Documents:
    """A corpus of given pieces; `cursors`: with cursors of its own."""

    name = "documents"

    def __init__(self, pieces: list[Piece], *, cursors: bool) -> None:
        self.given, self.opened = pieces, 0
        if cursors:
            self.pieces_from = self._from

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def pieces(self) -> Iterator[Piece]:
        self.opened += 1
        yield from self.given

    def _from(self, cursor: Any) -> Iterator[tuple[Piece, Any]]:
        first = cursor["passed"] if cursor else 0
        for number in range(first, len(self.given)):
            yield self.given[number], {"passed": number + 1}


def random_pieces(draw: random.Random) -> list[Piece]:
    """Documents of all sizes, in pieces of all sizes, with rows between them that hold no text."""
    found: list[Piece] = []
    for _ in range(draw.randint(1, 30)):
        if draw.random() < 0.2:
            found += [Piece("", False, draw.choice(["null", "empty", "broken"]))] * draw.randint(1, 3)
        size = draw.choice([1, 2, 5, 10, 30, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, draw.randint(1, 6 * UNIT)])
        text = "".join(draw.choices(ALPHABET if draw.random() < 0.8 else "x", k=size))
        cuts = sorted({draw.randrange(size) for _ in range(draw.choice([0, 0, 1, 3, 10]))} - {0})
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
        if draw.random() < 0.1:
            parts.append("")  # as where a separator ends a piece
        found += [Piece(part, place == len(parts) - 1) for place, part in enumerate(parts)]
    if draw.random() < 0.3:
        found.append(Piece("", False, "null"))
    return found


def texts_of(pieces: list[Piece], section: Section) -> tuple[list[str], dict[str, int]]:
    """The documents of a section, and how many rows were skipped in it, by the definition."""
    documents: list[str] = []
    skipped: dict[str, int] = {}
    at, text = 0, ""
    for piece in pieces:
        text += piece.text
        within = section.start <= at + len(text) and (section.end is None or at + len(text) < section.end)
        if piece.skipped and within:
            skipped[piece.skipped] = skipped.get(piece.skipped, 0) + 1
        if piece.last:
            end = len(text) if section.end is None else section.end - at
            if section.whole:
                documents += [text] if section.start <= at and end > 0 else []
            else:
                part = text[max(section.start - at, 0) : max(end, 0)]
                documents += [part] if part else []
            at, text = at + len(text), ""
    return documents, skipped


class Stop(Exception):
    """A test's interruption."""


def write(
    folder: Path,
    section: Section,
    encoder: Encoder,
    record: dict[str, Any] | None = None,
    *,
    units: int | None = None,
    killed: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write a section from a record on, for so many units at most; returns the record. `killed`: the end is not recorded."""
    record = json.loads(json.dumps(record))
    state = SplitState(**record["state"]) if record else SplitState()
    writer = SplitWriter(folder, "train", np.dtype("<u2"), state)
    remembered = folder / "train.filter"
    if record and encoder.filter is not None:
        encoder.filter.restore(remembered, record["filter"])
    latest: list[dict[str, Any]] = [json.loads(json.dumps(record or {}))]
    stopping = False

    def commit() -> None:
        if stopping and killed:
            return
        writer.flush()
        mark = encoder.filter.save(remembered) if encoder.filter is not None else {}
        latest[0] = json.loads(json.dumps({"state": asdict(state), "index": writer.index(), "filter": mark}))

    done = 0

    def tell(characters: int) -> None:
        nonlocal done, stopping
        done += 1
        if done == units:
            stopping = True
            raise Stop

    try:
        write_section(section, writer, encoder, 2, commit=commit, tell=tell, limit=limit)
    except Stop:
        pass
    finally:
        writer.close()
    return latest[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the record of a preparation that was killed when all was done."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != prepared.PROGRESS}


def fitted(name: str, pieces: list[Piece]) -> Tokenizer:
    made: Any = CharTokenizer() if name == "char" else ByteTokenizer()
    made.fit([*(p.text for p in pieces), "\n"])
    found: Tokenizer = made
    return found


def stream_of(folder: Path, record: dict[str, Any]) -> TokenStream:
    return TokenStream([(folder, SplitState(**record["state"]).entry(record["index"]))], np.dtype("<u2"))


@pytest.mark.parametrize("filtered", [False, True], ids=["", "filter"])
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("whole", [False, True], ids=["by characters", "by documents"])
def test_a_section_that_stops_anywhere_goes_on_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool, tokenizer: str, filtered: bool
) -> None:
    monkeypatch.setattr(pipeline, "UNIT", UNIT)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for case in range(14):
        draw = random.Random(f"{whole} {tokenizer} {filtered} {case}")
        monkeypatch.setattr(shard, "SHARD_TOKENS", draw.choice([3, 7, 64, 10**6]))
        monkeypatch.setattr(pipeline, "COMMIT_SECONDS", draw.choice([-1.0, -1.0, 100.0]))
        pieces = random_pieces(draw)
        length = sum(len(p.text) for p in pieces)
        start = draw.choice([0, 0, draw.randint(0, length)])
        end = draw.choice([None, draw.randint(start, length)])
        section = Section(Documents(pieces, cursors=draw.random() < 0.5), start, end, whole)
        own = fitted(tokenizer, pieces)

        def encoder(own: Tokenizer = own) -> Encoder:
            wanted = FilterConfig(exact_duplicates=True) if filtered else None
            return Encoder(own, np.dtype("<u2"), Filter(wanted, []) if wanted else None)

        straight, broken = tmp_path / f"{case}a", tmp_path / f"{case}b"
        straight.mkdir()
        broken.mkdir()
        expected = write(straight, section, encoder())
        if not filtered:
            _holds(straight, expected, own, pieces, section)
        record: dict[str, Any] | None = None
        for _ in range(1000):
            if record and record["state"]["ended"]:
                break
            record = write(broken, section, encoder(), record, units=draw.randint(1, 3), killed=draw.random() < 0.3) or None
            if not (record and record["state"]["ended"]):
                shards = record["state"]["shards"] if record else []
                growing = ["train.documents", f"train-{max(0, len(shards) - 1):05d}.bin", f"train-{len(shards):05d}.bin"]
                for file in (broken / name for name in [*growing, "train.filter"]):  # a killed process leaves more than it recorded
                    if not file.exists():
                        continue
                    with file.open("ab") as opened:
                        opened.write(draw.randbytes(draw.randint(0, 30)))
        assert record == expected, f"case {case}"
        assert files_of(broken) == files_of(straight), f"case {case}"


def _holds(folder: Path, record: dict[str, Any], tokenizer: Tokenizer, pieces: list[Piece], section: Section) -> None:
    """The shards hold the section's documents, each where the index says that it begins, and the counts are right."""
    documents, skipped = texts_of(pieces, section)
    state, stream = record["state"], stream_of(folder, record)
    border = [tokenizer.end_of_text] if tokenizer.end_of_text is not None else tokenizer.encode("\n\n").tolist()
    ids: list[int] = []
    starts: list[int] = []
    for text in documents:
        starts.append(len(ids))
        ids += [*(border if ids else []), *tokenizer.encode(text).tolist()]
    assert (stream.window(0, len(stream)).tolist() if len(stream) else []) == ids
    assert stream.document_starts().tolist() == starts
    assert (state["tokens"], state["documents"]) == (len(ids), len(documents))
    assert state["characters"] == state["bytes"] == sum(map(len, documents))
    assert state["skipped"] == skipped
    assert all(s["tokens"] for s in state["shards"]) or not ids


def test_a_section_that_begins_at_the_empty_end_of_a_document_does_not_begin_with_it() -> None:
    corpus = Documents([Piece("abc", False), Piece("", True), Piece("de", True)], cursors=False)
    assert [p for p, _, _ in pipeline.read_section(Section(corpus, 3))] == [Piece("de", True)]
    assert [p for p, _, _ in pipeline.read_section(Section(corpus, 0, 3))] == [Piece("abc", True)]
    assert [p for p, _, _ in pipeline.read_section(Section(corpus, 0, 3, whole=True))] == [Piece("abc", False), Piece("", True)]


def test_rows_without_text_fill_a_unit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", UNIT)
    corpus = Documents([Piece("a", True), *[Piece("", False, "null")] * 1000, Piece("b", True)], cursors=True)
    units = list(pipeline.units(pipeline.read_section(Section(corpus))))
    assert max(len(unit.pieces) for unit in units) <= UNIT
    assert [p for unit in units for p in unit.pieces] == corpus.given
    assert all(unit.begins for unit in units)


def test_two_sections_by_whole_documents_share_none_and_lose_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", UNIT)
    for case in range(100):
        draw = random.Random(case)
        pieces = random_pieces(draw)
        border = draw.randint(0, sum(len(p.text) for p in pieces))
        corpus = Documents(pieces, cursors=False)
        found = []
        for section in (Section(corpus, 0, border, True), Section(corpus, border, None, True)):
            read = [p for p, _, _ in pipeline.read_section(section)]
            found += [p for p in read if not p.skipped]
        assert found == [p for p in pieces if not p.skipped]


def test_a_limit_is_reached_and_growing_is_the_same_as_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", UNIT)
    monkeypatch.setattr(shard, "SHARD_TOKENS", 100)
    draw = random.Random(0)
    pieces = [p for _ in range(10) for p in random_pieces(draw)]
    section, encoder = Section(Documents(pieces, cursors=True), whole=True), Encoder(fitted("byte", []), np.dtype("<u2"))
    made = {}
    for name, limits in {"grown": (500, 1200), "direct": (1200,)}.items():
        (tmp_path / name).mkdir()
        record: dict[str, Any] | None = None
        for limit in limits:
            record = write(tmp_path / name, section, encoder, record, limit=limit)
            assert limit <= record["state"]["tokens"] < limit + 3 * UNIT + 10
            assert not record["state"]["ended"]
        made[name] = (record, files_of(tmp_path / name))
    assert made["grown"] == made["direct"]


# Through prepare()


def corpus_of(folder: Path, kind: str) -> Path:
    """Some kilobytes of text, of many documents or one."""
    draw = random.Random(kind)
    folder.mkdir(exist_ok=True)
    if kind == "rows":
        lines = []
        for _ in range(200):
            text = " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 8))) for _ in range(draw.randint(0, 120)))
            lines.append(json.dumps({"text": draw.choice([text, text, text, None, ""])}))
        (folder / "a.jsonl").write_text("\n".join(lines + lines[:40]) + "\n")
        return folder / "a.jsonl"
    (folder / "a.txt").write_text(" ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 8))) for _ in range(8000)))
    return folder / "a.txt"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE", 700)
    monkeypatch.setattr(pipeline, "UNIT", 1000)
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(shard, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(work, "KEPT", 0)
    monkeypatch.setattr(os, "fsync", lambda _: None)


CASES = [("rows", "char", False), ("rows", "byte", True), ("rows", "bpe", True), ("text", "char", False), ("text", "gpt2", False)]


def config(file: Path, tokenizer: str, filtered: bool) -> DataConfig:
    options: dict[str, Any] = {"vocabulary": 300} if tokenizer == "bpe" else {}
    chosen: Any = component("data/tokenizer", tokenizer).options(**options)
    made = config_of(file, filter=FilterConfig(exact_duplicates=filtered, near_duplicates=0.8 if filtered else 0.0))
    made.tokenizer = chosen
    return made


@pytest.mark.parametrize(("kind", "tokenizer", "filtered"), CASES)
def test_a_preparation_that_is_stopped_or_killed_between_units_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, tiktoken_cache: Path, kind: str, tokenizer: str, filtered: bool
) -> None:
    made_of = config(corpus_of(tmp_path / "text", kind), tokenizer, filtered)
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "straight"))
    stages: list[str] = []
    whole = prepare(made_of, report=lambda p: stages.append(p.stage), threads=2)
    units = [i for i, stage in enumerate(stages) if stage in ("val", "train")]
    assert len(units) > 15
    for stop in sorted({*units[::8], units[-1]}):
        for killed in (False, True):
            home = tmp_path / f"{stop}{killed}"
            monkeypatch.setenv("GPTLAB_HOME", str(home))
            kept = tmp_path / f"kept{stop}"
            calls = 0

            def interrupt(progress: Progress, stop: int = stop, killed: bool = killed, home: Path = home, kept: Path = kept) -> None:
                nonlocal calls
                calls += 1
                if calls == stop + 1:
                    if killed:
                        shutil.copytree(home, kept)
                    raise Stop

            with pytest.raises(Stop):
                prepare(made_of, report=interrupt, threads=2)
            if killed:  # what lay on the disk at that moment
                shutil.rmtree(home)
                kept.rename(home)
            again: list[Progress] = []
            found = prepare(made_of, report=again.append, threads=2)
            assert files_of(found.folder) == files_of(whole.folder), f"stopped at {stop}, {killed=}"
            assert found.hash == whole.hash
            if not killed and stop > units[8]:
                assert sum(p.stage == "train" for p in again) < len([s for s in stages if s == "train"]), "it began anew"


def test_an_interrupt_at_any_line_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None) -> None:
    made_of = config(corpus_of(tmp_path / "text", "rows"), "byte", True)
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "straight"))
    traced = (pipeline.__file__, shard.__file__, work.__file__)
    lines = 0
    at = -1

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in traced or frame.f_code.co_name in ("close", "__exit__"):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    def traced_preparation() -> Any:
        nonlocal lines
        lines = 0
        sys.settrace(trace)
        try:
            return prepare(made_of, threads=1)
        finally:
            sys.settrace(None)

    whole = traced_preparation()
    total = lines
    assert total > 5000
    draw = random.Random(0)
    for case in range(25):
        home = tmp_path / str(case)
        monkeypatch.setenv("GPTLAB_HOME", str(home))
        at = place = draw.randint(total // 3, total)
        with pytest.raises(KeyboardInterrupt):
            traced_preparation()
        at = -1
        assert files_of(prepare(made_of).folder) == files_of(whole.folder), f"interrupted at line {place} of {total}"
        shutil.rmtree(home)


def test_a_full_disk_keeps_what_is_written_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, empty_home: Path
) -> None:
    made_of = config(corpus_of(tmp_path / "text", "rows"), "byte", False)
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "straight"))
    whole = prepare(made_of)
    for room in (30_000, 50_001, 70_000):
        monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / str(room)))
        disk = _Disk(room)
        resume = SplitWriter._resume
        monkeypatch.setattr(SplitWriter, "_resume", lambda *a, disk=disk, resume=resume: disk.wrap(resume(*a)))
        with pytest.raises(IOFailure, match=r"could not be written \(No space left on device\)") as error:
            prepare(made_of)
        assert "the same command goes on from there" in str(error.value)
        assert "bytes more" in str(error.value)
        assert error.value.code == 74
        disk.room = 10**9
        assert files_of(prepare(made_of).folder) == files_of(whole.folder)
        monkeypatch.setattr(SplitWriter, "_resume", resume)


class _Disk:
    """A disk with room for so many bytes: what does not fit is written in part, and refused."""

    def __init__(self, room: int) -> None:
        self.room = room

    def wrap(self, opened: tuple[Any, Any]) -> tuple[Any, Any]:
        disk, file = self, opened[0]

        class File:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: bytes) -> int:
                file.write(data[: disk.room])
                disk.room -= len(data)
                if disk.room < 0:
                    disk.room = 0
                    raise OSError(28, "No space left on device")
                return len(data)

        return File(), opened[1]


KILLED = """
import sys, time
from gptlab.data import pipeline, shard, work
from gptlab.data.prepare import prepare
from tests.data.test_shard import config_of
pipeline.UNIT, pipeline.COMMIT_SECONDS, shard.SHARD_TOKENS, work.KEPT = 1000, 0.0, 3000, 0
def told(progress):
    if progress.stage == "train":
        print(progress.tokens, flush=True)
        time.sleep(0.005)
prepare(config_of(sys.argv[1], "byte"), report=told)
print("done", flush=True)
"""


def test_a_process_that_is_killed_leaves_what_the_next_goes_on_with(tmp_path: Path, empty_home: Path) -> None:
    file = corpus_of(tmp_path / "text", "text")

    def started(home: Path) -> subprocess.Popen[str]:
        place = Path(__file__).parents[2]
        environment = {**os.environ, "GPTLAB_HOME": str(home)}
        return subprocess.Popen([sys.executable, "-c", KILLED, str(file)], cwd=place, env=environment, stdout=subprocess.PIPE, text=True)

    process = started(tmp_path / "killed")
    assert process.stdout
    for _ in range(12):
        assert process.stdout.readline().strip().isdigit()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = next((tmp_path / "killed" / "data").glob("text-*"))
    assert (folder / "progress.json").is_file()
    assert not (folder / "manifest.json").exists()
    on, whole = started(tmp_path / "killed"), started(tmp_path / "whole")
    said = [p.communicate(timeout=60)[0].split() for p in (on, whole)]
    assert said[0][-1] == said[1][-1] == "done"
    assert 0 < len(said[0]) < len(said[1]), "it began anew"
    assert files_of(folder) == files_of(tmp_path / "whole" / "data" / folder.name)


def test_a_validation_set_that_is_trained_on_is_refused_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, empty_home: Path
) -> None:
    file = corpus_of(tmp_path / "text", "text")
    (tmp_path / "same.txt").write_text(file.read_text()[:20_000])
    made_of = config_of(file, "byte", validation={"same": str(tmp_path / "same.txt")})

    def killed(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(work, "refuse_overlap", killed)
        with pytest.raises(Stop):
            prepare(made_of)
    with pytest.raises(DataError, match=r"data\.validation\.same: .* of it stands in the training text too"):
        prepare(made_of)


def test_files_that_were_shortened_below_the_record_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, empty_home: Path
) -> None:
    made_of = config(corpus_of(tmp_path / "text", "text"), "byte", False)

    def interrupt(progress: Progress) -> None:
        if progress.tokens > 12_000:
            raise Stop

    with pytest.raises(Stop):
        prepare(made_of, report=interrupt)
    folder = next((empty_home / "data").glob("text-*"))
    record = prepared.read_progress(folder)["splits"]["train"]
    file = folder / record["shards"][-1]["file"]
    os.truncate(file, record["shards"][-1]["tokens"] * 2 - 2)
    with pytest.raises(DataError, match=r"is missing or shorter than the [\d,]+ bytes recorded; delete .* and run again") as error:
        prepare(made_of)
    assert str(file) in str(error.value)


def test_only_whole_units_are_ever_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes in the middle of a unit (a full disk, Ctrl-C) must not record half of it."""
    monkeypatch.setattr(pipeline, "UNIT", UNIT)
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", -1.0)
    pieces = random_pieces(random.Random(3))
    section, encoder = Section(Documents(pieces, cursors=True)), Encoder(fitted("byte", []), np.dtype("<u2"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = write(tmp_path / "a", section, encoder)
    plain: Callable[..., None] = SplitWriter.write
    calls = 0

    def interrupted(self: SplitWriter, ids: Any, starts: Any) -> None:
        nonlocal calls
        calls += 1
        plain(self, ids, starts)
        if calls in (2, 5):
            raise Stop

    monkeypatch.setattr(SplitWriter, "write", interrupted)
    record: dict[str, Any] | None = None
    for _ in range(3):
        record = write(tmp_path / "b", section, encoder, record)
    assert record == expected
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
