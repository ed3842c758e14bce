"""Preparing: text becomes the same tokens whatever the cuts, threads and shards, and nothing half-made or altered is ever used."""

from __future__ import annotations

import http.server
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component, load_components
from gptlab.config.schema import DataConfig
from gptlab.data import pipeline, reader, shard
from gptlab.data.loader import Loader
from gptlab.data.prepare import Progress, prepare
from gptlab.data.prepared import Prepared, open_prepared
from gptlab.data.sources import training_rows
from tests.conftest import sentences

load_components()
TIKTOKEN = ["gpt2", "cl100k", "o200k"]


def config_of(path: Path | str, tokenizer: str = "char", *, kind: str = "text", **values: Any) -> DataConfig:
    return DataConfig(
        corpus=component("data/corpus", kind).options(path=str(path)),  # type: ignore[call-arg]
        tokenizer=component("data/tokenizer", tokenizer).options(),
        **values,
    )


def ids_of(prepared: Prepared, split: str = "train") -> list[int]:
    stream = prepared.stream(split)
    return stream.window(0, len(stream)).tolist() if len(stream) else []


def left_in(folder: Path) -> list[str]:
    """Everything below a folder that is a file, but for the empty locks."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock")


def units_of(pieces: Iterable[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """The pieces cut into units of work, without where each stands."""

    class Pieces:
        name = "pieces"

        def pieces(self) -> Iterable[tuple[str, bool]]:
            return pieces

    section = pipeline.Section(Pieces())  # type: ignore[arg-type]
    return [[(p.text, p.last) for p in unit.pieces] for unit in pipeline.units(pipeline.read_section(section))]


# What is prepared


def test_gpt2_gives_tiny_shakespeare_its_published_token_counts(shared_text: Callable[[str], Path], tiktoken_cache: Path) -> None:
    prepared = prepare(config_of(shared_text("tinyshakespeare.txt"), "gpt2", kind="shakespeare"))
    splits = prepared.manifest["splits"]
    assert (splits["train"]["tokens"], splits["val"]["tokens"]) == (301_966, 36_059)
    assert (splits["train"]["characters"], splits["val"]["characters"]) == (1_003_854, 111_540)
    assert prepared.manifest["dtype"] == "<u2"
    text = shared_text("tinyshakespeare.txt").read_text()
    assert prepared.tokenizer.decode(ids_of(prepared, "val")) == text[1_003_854:]


@pytest.mark.parametrize(("tokenizer", "dtype"), [("char", "<u2"), ("byte", "<u2"), ("gpt2", "<u2"), ("cl100k", "<u4"), ("o200k", "<u4")])
def test_the_shards_hold_the_whole_text_in_the_dtype_that_fits(corpus_file: Path, tokenizer: str, dtype: str, tiktoken_cache: Path) -> None:
    prepared = prepare(config_of(corpus_file, tokenizer))
    text = corpus_file.read_text()
    assert prepared.manifest["dtype"] == dtype
    border = int(len(text) * 0.9)
    assert prepared.tokenizer.decode(ids_of(prepared)) == text[:border]
    assert prepared.tokenizer.decode(ids_of(prepared, "val")) == text[border:]
    for split, part in (("train", text[:border]), ("val", text[border:])):
        held = prepared.manifest["splits"][split]
        assert held["tokens"] == len(prepared.stream(split)) == sum(s["tokens"] for s in held["shards"])
        assert (held["characters"], held["bytes"], held["documents"]) == (len(part), len(part.encode()), 1)


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "char"])
def test_a_border_between_documents_and_none_after_the_last(tmp_path: Path, tokenizer: str, tiktoken_cache: Path) -> None:
    texts = ["alpha beta", "gamma", "delta " * 9]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    prepared = prepare(config_of(tmp_path, tokenizer, validation_fraction=0.3))
    own = prepared.tokenizer
    border = [own.end_of_text] if own.end_of_text is not None else own.encode("\n\n").tolist()
    encoded = [own.encode(t).tolist() for t in texts]
    cut = int(sum(map(len, texts)) * 0.7) - 15
    held = [own.encode(texts[2][:cut]).tolist(), own.encode(texts[2][cut:]).tolist()]
    assert ids_of(prepared) == [*encoded[0], *border, *encoded[1], *border, *held[0]]
    assert ids_of(prepared, "val") == held[1]
    assert prepared.manifest["splits"]["train"]["documents"] == 3
    assert prepared.manifest["between_documents"] == ("text" if tokenizer == "char" else "end_of_text")


@pytest.mark.parametrize("total", [*range(96, 105), 200])
def test_no_character_is_lost_where_borders_meet_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    for constant in (9, 10, 45, 90):
        monkeypatch.setattr(reader, "PIECE", constant)
        monkeypatch.setattr(pipeline, "UNIT", 10)
        monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / str(constant)))
        file = tmp_path / "x.txt"
        text = "abcdefghij"[:7] * 100
        file.write_text(text[:total])
        prepared = prepare(config_of(file), threads=1)
        assert prepared.tokenizer.decode(ids_of(prepared)) + prepared.tokenizer.decode(ids_of(prepared, "val")) == text[:total]


def nasty() -> Iterator[str]:
    draw = random.Random(0)
    parts = ["the", " ", "  ", "\n", "\n\n", "\r\n", "\t", "'s", "'S", "'", "’ll", "don't", "123", "4567890", " 12"]
    parts += [".", "...", "!!", "?\n", "/", "\n/", "//\n"]
    parts += ["é", "e\u0301", "日本語", "。", "、", "：", "नमस्ते", "👩‍👩‍👧", "\u200b", "\u3000", "\xa0", "\x85", "\x1c"]
    parts += ["½", "²", "Ⅷ", "_", "a_b", "CamelCase", "ǅ", "ʰ"]
    parts += ["<|endoftext|>", "ﬁ", "İ", "\u2028", "—", "…", "-", "\ufeff"]
    for size in (300, 1000, 1000):
        for favoured in (parts, parts[:22], [*parts[22:], " ", "\n"]):
            yield "".join(draw.choices(favoured, k=size))
    yield "a" * 500
    yield " " * 500
    yield "\n" * 500
    yield "x\n" * 300
    yield "a b" * 300
    yield "1,2\n" * 300
    yield "a.b,c;d:e!f?" * 100


@pytest.mark.parametrize("name", TIKTOKEN)
def test_safe_cuts_leave_the_tokens_of_any_text_as_they_are(name: str, tiktoken_cache: Path) -> None:
    tokenizer = build(component("data/tokenizer", name).options())
    cuts = 0
    for text in nasty():
        whole = tokenizer.encode(text).tolist()
        places = [m.start() for m in pipeline._CUT.finditer(text) if m.start()]
        cuts += len(places)
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert [t for part in parts for t in tokenizer.encode(part).tolist()] == whole
    assert cuts > 2000


@pytest.mark.parametrize("file", ["tinyshakespeare.txt", "de_debian_handbook.txt", "de_fortunes_zitate.txt", "enwiki_excerpt_clean.txt"])
@pytest.mark.parametrize("name", TIKTOKEN)
def test_pieces_give_the_tokens_of_the_whole(
    name: str, file: str, shared_text: Callable[[str], Path], tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 1000)
    tokenizer = build(component("data/tokenizer", name).options())
    text = shared_text(file).read_text(encoding="utf-8")[:400_000]
    pieces = [(text[i : i + 777], i + 777 >= len(text)) for i in range(0, len(text), 777)]
    units = units_of(pieces)
    assert len(units) > len(text) // 2000
    assert "".join(t for unit in units for t, _ in unit) == text
    cut = [t for unit in units for part, _ in unit for t in tokenizer.encode(part).tolist()]
    assert cut == tokenizer.encode(text).tolist()


def test_units_are_bounded_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 100)
    for text in ("a" * 5000, "ab " * 2000, "\n" * 3000):
        for size in (1, 30, 99, 100, 101, 250, 10_000):
            pieces = [(text[i : i + size], i + size >= len(text)) for i in range(0, len(text), size)]
            units = units_of(pieces)
            assert "".join(t for unit in units for t, _ in unit) == text
            assert [last for unit in units for _, last in unit][-1]
            assert max(sum(len(t) for t, _ in unit) for unit in units) < 300
    many = [("abc", True)] * 1000
    units = units_of(many)
    assert [piece for unit in units for piece in unit] == many
    assert len(units) < 40


# However it is prepared


def test_threads_do_not_change_a_byte(shared_text: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 1 << 14)
    made = []
    for threads in (1, 2):
        monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / str(threads)))
        folder = prepare(config_of(shared_text("en_debian_handbook.txt"), "byte"), threads=threads).folder
        made.append({f.name: f.read_bytes() for f in folder.iterdir()})
    assert made[0] == made[1]
    assert len(made[0]) == 6


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_shards_of_any_size_hold_the_same_stream(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = prepare(config_of(corpus_file, "byte"))
    file = corpus_file
    if size == 1:
        file = tmp_path / "short.txt"
        file.write_text(corpus_file.read_text()[:300])
        whole = prepare(config_of(file, "byte"))
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shard, "SHARD_TOKENS", size)
    cut = prepare(config_of(file, "byte"))
    for split in ("train", "val"):
        shards = cut.manifest["splits"][split]["shards"]
        assert {s["tokens"] for s in shards[:-1]} <= {size}
        assert 0 < shards[-1]["tokens"] <= size
        assert ids_of(cut, split) == ids_of(whole, split)
    one, two = (Loader(training_rows(p, 16, "concatenate", 0), 4).batch(3) for p in (whole, cut))
    assert one.inputs.tolist() == two.inputs.tolist()


def test_what_is_prepared_is_found_again_and_what_changed_is_made_anew(tmp_path: Path, empty_home: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc " * 50)
    reports: list[Progress] = []
    first = prepare(config_of(file), report=reports.append)
    assert (reports[-1].done, reports[-1].total, reports[-1].tokens) == (200, 200, 200)
    reports.clear()
    again = prepare(config_of(file), report=reports.append)
    assert again.folder == first.folder
    assert not reports
    os.utime(file, ns=(5, 5))
    touched = prepare(config_of(file))
    assert touched.folder != first.folder
    assert touched.hash == first.hash, "the same text under another date is the same data"
    file.write_text("abd " * 50)
    assert prepare(config_of(file)).hash != first.hash
    assert prepare(config_of(file, validation_fraction=0.2)).hash != touched.hash
    assert not [f for f in left_in(empty_home) if "/." in f]


def test_the_hash_is_that_of_the_content_alone(corpus_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(corpus_file.read_bytes())
    one, two = prepare(config_of(corpus_file)), prepare(config_of(copy))
    assert one.hash == two.hash
    assert str(tmp_path) not in json.dumps(two.manifest)


# What is refused


@pytest.fixture
def made(tmp_path: Path, empty_home: Path) -> Prepared:
    file = tmp_path / "a.txt"
    file.write_text(sentences(40))
    return prepare(config_of(file, "byte"))


def _truncate(folder: Path) -> None:
    os.truncate(folder / "train-00000.bin", 10)


def _alter(folder: Path) -> None:
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[100] ^= 1
    (folder / "train-00000.bin").write_bytes(data)


def _lose(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()


def test_a_shard_that_does_not_match_names_file_expected_and_found(made: Prepared) -> None:
    file = made.folder / "train-00000.bin"
    whole, size = file.read_bytes(), made.manifest["splits"]["train"]["tokens"] * 2
    for damage, said in (
        (_truncate, f"has 10 bytes, its manifest says {size:,}"),
        (_alter, f"its manifest says {made.manifest['splits']['train']['shards'][0]['sha256'][:12]}"),
        (_lose, "is missing"),
    ):
        damage(made.folder)
        with pytest.raises(DataError) as error:
            open_prepared(made.folder).stream("train")
        assert str(file) in str(error.value)
        assert said in str(error.value)
        assert f"delete {made.folder} and run again" in str(error.value)
        assert error.value.code == 3
        file.write_bytes(whole)
    assert len(made.stream("train")) == size // 2


def test_a_tokeniser_of_another_manifest_is_refused(made: Prepared, corpus_file: Path) -> None:
    other = prepare(config_of(corpus_file, "char"))
    (made.folder / "tokenizer.json").write_bytes((other.folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError) as error:
        open_prepared(made.folder)
    said = str(error.value)
    assert f"tokenizer.json is char with sha256 {other.manifest['tokenizer']['sha256'][:12]}" in said
    assert f"its manifest says byte with {made.manifest['tokenizer']['sha256'][:12]}" in said


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "tokenizer": {}}'])
def test_a_damaged_manifest_is_told(made: Prepared, content: str) -> None:
    (made.folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"cannot be read .*; delete .* and run again") as error:
        open_prepared(made.folder)
    assert str(made.folder) in str(error.value)


def test_a_manifest_of_another_format_and_a_set_that_is_not_there(made: Prepared) -> None:
    with pytest.raises(DataError, match=r"there is no set 'test'; there are train, val"):
        made.stream("test")
    (made.folder / "manifest.json").write_text(json.dumps({**made.manifest, "format": 9}))
    with pytest.raises(DataError, match="has format 9, this gptlab reads format 2"):
        open_prepared(made.folder)


def test_a_folder_without_its_manifest_is_made_anew(made: Prepared, tmp_path: Path) -> None:
    (made.folder / "manifest.json").unlink()
    assert prepare(config_of(tmp_path / "a.txt", "byte")).hash == made.hash


@pytest.mark.parametrize(
    ("content", "error", "code"),
    [(None, ConfigError, 2), (b"", DataError, 3), (b"\0\1", DataError, 3), (b"ab" * 700_000 + b"\xff", DataError, 3)],
    ids=["missing", "empty", "binary", "not UTF-8"],
)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_text_that_cannot_be_used_leaves_nothing_behind(
    tmp_path: Path, empty_home: Path, tokenizer: str, content: bytes | None, error: type[Exception], code: int
) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=r"a\.txt") as raised:
        prepare(config_of(file, tokenizer))
    assert raised.value.code == code  # type: ignore[attr-defined]
    assert left_in(empty_home) == []


@pytest.mark.parametrize("what", ["thread", "disk", "interrupt", "report"])
def test_a_failure_half_way_leaves_nothing_behind(corpus_file: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    config = config_of(corpus_file, "byte")
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise {"disk": OSError(28, "No space left on device"), "interrupt": KeyboardInterrupt()}.get(what, RuntimeError("no"))

    report = None
    if what == "thread":
        monkeypatch.setattr(type(build(config.tokenizer)), "encode", fail)
    elif what == "report":
        report = fail
    else:
        monkeypatch.setattr(os, "fsync", fail)
    expected = {"disk": IOFailure, "interrupt": KeyboardInterrupt, "report": RuntimeError, "thread": Exception}[what]
    with pytest.raises(expected) as error:
        prepare(config, report=report)
    if what == "disk":
        assert "could not be written (No space left on device)" in str(error.value)
    assert left_in(empty_home) == []


def test_a_home_that_cannot_be_written_is_an_io_failure(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "file"))
    with pytest.raises(IOFailure, match=r"could not be read or written \(Not a directory\)"):
        prepare(config_of(corpus_file))


def test_an_id_the_dtype_cannot_hold_is_refused(corpus_file: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(corpus_file, "byte")
    monkeypatch.setattr(type(build(config.tokenizer)), "encode", lambda _self, _text: np.array([70_000], np.uint32))
    with pytest.raises(DataError, match="token id 70000 does not fit uint16"):
        prepare(config)
    assert left_in(empty_home) == []


def test_a_very_short_text_is_prepared_and_refused_by_the_loader(tmp_path: Path) -> None:
    for text in ("a", "ab", "abc" * 5):
        file = tmp_path / f"{len(text)}.txt"
        file.write_text(text)
        prepared = prepare(config_of(file))
        assert ids_of(prepared) + ids_of(prepared, "val") == prepared.tokenizer.encode(text).tolist()
        with pytest.raises(DataError, match="too few for one batch of 4 x 8"):
            Loader(training_rows(prepared, 8, "concatenate", 0), 4)


# Further validation sets


def test_further_validation_sets_are_whole_and_stay_when_the_training_text_grows(tmp_path: Path) -> None:
    text, extra = tmp_path / "a.txt", tmp_path / "books"
    text.write_text(sentences(300))
    extra.mkdir()
    (extra / "1.txt").write_text(sentences(30, seed=1))
    (extra / "2.txt").write_text("Zwölf Boxkämpfer")
    config = config_of(text, "byte", validation={"books": str(extra)})
    before = prepare(config)
    assert before.validation_names == ["val", "books"]
    assert before.tokenizer.decode(ids_of(before, "books")) == sentences(30, seed=1) + "Zwölf Boxkämpfer"
    assert ids_of(before, "books").count(256) == 1
    text.write_text(sentences(400))
    after = prepare(config)
    assert after.manifest["splits"]["books"] == before.manifest["splits"]["books"]
    by_character = prepare(config_of(text, "char", validation={"books": str(extra)}))
    assert len(by_character.tokenizer.encode("ö")) == 1, "a character of a validation set is unknown"


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_a_validation_set_that_is_trained_on_is_refused(tmp_path: Path, empty_home: Path, tokenizer: str, tiktoken_cache: Path) -> None:
    text, extra = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text(sentences(600))
    for overlap in (sentences(600), sentences(600)[3000:9000], sentences(200, seed=2) + sentences(600)[:4000]):
        extra.write_text(overlap)
        with pytest.raises(DataError, match=r"data\.validation\.more: \d+% of it stands in the training text too") as error:
            prepare(config_of(text, tokenizer, validation={"more": str(extra)}))
        assert error.value.code == 3
        assert left_in(empty_home) == []
    extra.write_text(sentences(100, seed=3))
    prepare(config_of(text, tokenizer, validation={"more": str(extra)}))


def test_an_overlap_is_found_across_shards_and_stretches(tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_TOKENS", 500)
    monkeypatch.setattr(pipeline, "UNIT", 300)
    text, extra = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text(sentences(600))
    extra.write_text(sentences(600)[4000:5000])
    with pytest.raises(DataError, match="100% of it stands in the training text"):
        prepare(config_of(text, "byte", validation={"more": str(extra)}))


def test_a_validation_set_with_a_bad_name_or_path_is_refused(corpus_file: Path) -> None:
    for name in ("train", "val", "a/b"):
        with pytest.raises(ConfigError, match=rf"data\.validation\.{name}: choose another name"):
            prepare(config_of(corpus_file, validation={name: str(corpus_file)}))
    with pytest.raises(ConfigError, match=r"data\.validation\.x=nowhere: there is no such file or folder"):
        prepare(config_of(corpus_file, validation={"x": "nowhere"}))


# Together


def test_preparing_the_same_data_at_once_gives_one_folder(corpus_file: Path, empty_home: Path) -> None:
    config = config_of(corpus_file, "byte")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prepare(config), range(8)))
    assert len({p.folder for p in found}) == 1
    assert all(len(p.stream("train")) for p in found)
    assert left_in(empty_home) == sorted(
        f"data/{found[0].folder.name}/{n}"
        for n in ("manifest.json", "tokenizer.json", "train-00000.bin", "train.documents", "val-00000.bin", "val.documents")
    )


def test_two_processes_preparing_the_same_data_both_succeed(corpus_file: Path, empty_home: Path) -> None:
    code = (
        "import sys; from tests.data.test_shard import config_of; from gptlab.data.prepare import prepare\n"
        "sys.stdin.readline(); print(prepare(config_of(sys.argv[1], 'byte')).hash)"
    )
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(corpus_file)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate()[0] for worker in workers]
    assert said[0] == said[1] == prepare(config_of(corpus_file, "byte")).hash + "\n"
    assert len(left_in(empty_home)) == 6


def test_shakespeare_comes_over_the_network_into_shards(shared_text: Callable[[str], Path], empty_home: Path) -> None:
    folder = shared_text("tinyshakespeare.txt").parent

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, error in (("jane_austen.txt", DataError), ("absent.txt", IOFailure), ("tinyshakespeare.txt", None)):
            options = component("data/corpus", "shakespeare").options(url=f"http://127.0.0.1:{server.server_port}/{name}")  # type: ignore[call-arg]
            config = DataConfig(corpus=options, tokenizer=component("data/tokenizer", "char").options())
            if error is None:
                prepared = prepare(config)
                assert prepared.tokenizer.vocabulary == 65
                assert prepare(config).folder == prepared.folder
            else:
                with pytest.raises(error):
                    prepare(config)
                assert left_in(empty_home) == []
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_large_file_is_prepared_in_bounded_memory(tmp_path: Path, empty_home: Path) -> None:
    text = sentences(10_000).encode()
    with (tmp_path / "big.txt").open("wb") as file:
        while file.tell() < 64_000_000:
            file.write(text)
    code = (
        "import resource, sys; from tests.data.test_shard import config_of; from gptlab.data.prepare import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(config_of(sys.argv[1], 'byte'), threads=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.txt")], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout) / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    assert grown < 120, f"{grown:.0f} MB for a file of 64 MB"
