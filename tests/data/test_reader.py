"""The user's files: every kind plain and compressed, each row once, and what is broken is counted, named or refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptlab.config.errors import ConfigError, DataError
from gptlab.data import reader
from gptlab.data.corpus import Text
from gptlab.data.prepare import prepare
from gptlab.data.reader import Piece, read_file, text_files
from tests.data.test_shard import config_of, ids_of

TEXTS = ["erste Zeile\nzweite", 'größer, "und" kleiner', "日本語 👩‍👩‍👧", "last " * 50]


def plain(texts: list[str]) -> bytes:
    return "\n---\n".join(texts).encode()


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_csv(texts: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    return out.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), out, row_group_size=2)
    return out.getvalue()


def zst(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[list[str]], bytes]] = {".txt": plain, ".md": plain, ".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zst}


def write(folder: Path, name: str, texts: list[str]) -> Path:
    """A file of texts as its name says."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    compression = next((s for s in (".gz", ".zst") if name.endswith(s)), "")
    kind = Path(name.removesuffix(compression)).suffix.lower()
    file.write_bytes(COMPRESSIONS[compression](KINDS[kind](texts)))
    return file


def documents(pieces: list[Piece]) -> list[str]:
    """The documents that pieces make; those skipped are left out."""
    found, parts = [], ""
    for piece in pieces:
        assert not (piece.skipped and (piece.text or piece.last))
        parts += piece.text
        if piece.last:
            found.append(parts)
            parts = ""
    assert not parts, "the last document has no end"
    return found


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_documents(tmp_path: Path, kind: str, compression: str) -> None:
    file = write(tmp_path, f"a{kind}{compression}", TEXTS)
    found = list(read_file(file, separator="\n---\n"))
    assert documents(found) == TEXTS
    whole = documents(list(read_file(file)))
    assert whole == (["\n---\n".join(TEXTS)] if kind in (".txt", ".md") else TEXTS), "no separator: a plain file is one document"


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"one, ") + gzip.compress(b"two"))
    assert documents(list(read_file(file))) == ["one, two"]


def test_folders_and_globs_are_all_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.txt.gz", "a/c.parquet", "a/deep/k.MD", "a/deep/skip.png.txt"):
        write(tmp_path, name, ["x"])
    for name in ("a/no.py", "a/none.gz", "a/deep/README"):
        (tmp_path / name).write_text("no text")
    (tmp_path / "empty.txt").write_text("")

    def names(spec: str) -> list[str]:
        return [f.relative_to(tmp_path).as_posix() for f in text_files(spec, "data.corpus.path")]

    everything = ["a/c.parquet", "a/deep/k.MD", "a/deep/skip.png.txt", "a/z.txt.gz", "b.jsonl"]
    assert names(str(tmp_path)) == everything
    assert names(f"{tmp_path}/**/*.txt*") == ["a/deep/skip.png.txt", "a/z.txt.gz", "empty.txt"]
    assert names(f"{tmp_path}/a/*.p[ab]*") == ["a/c.parquet"]
    assert len(list(Text(path=f"{tmp_path}/a/**/*.[tmM]*").pieces())) == 3
    with pytest.raises(ConfigError, match=r"data\.corpus\.path=.*/\*\.csv: no file matches"):
        names(f"{tmp_path}/**/*.csv")
    odd = tmp_path / "what [is] this.txt"
    odd.write_text("a name with brackets is a file first")
    assert text_files(str(odd), "key") == [odd]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 11, 1000])
@pytest.mark.parametrize("separator", ["\n", "---", "\n\n\n", "aab"])
def test_separators_are_found_across_the_borders_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, size: int
) -> None:
    monkeypatch.setattr(reader, "PIECE", size)
    for texts in (["a", "bc", "aaa", "d" * 30], ["x" * 50, "-" + "y" * 9], ["", " ", "z", "", "q"], ["one"]):
        for end in ("", separator):
            file = tmp_path / "a.txt"
            text = separator.join(texts) + end
            file.write_text(text)
            found = list(read_file(file, separator=separator))
            expected = text.split(separator)
            kept = [t for t in expected if t.strip()]
            assert documents(found) == kept
            empty = [t for t in (expected[:-1] if not expected[-1].strip() else expected) if not t.strip()]
            assert [p.skipped for p in found if p.skipped] == ["empty"] * len(empty)


def test_a_long_document_between_separators_comes_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE", 10)
    (tmp_path / "a.txt").write_text("b" * 1000 + "##" + "c" * 500)
    found = list(read_file(tmp_path / "a.txt", separator="##"))
    assert max(len(p.text) for p in found) <= 30
    assert documents(found) == ["b" * 1000, "c" * 500]


def test_the_separator_of_a_config_may_say_new_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n%%\ntwo")
    assert documents(list(Text(path=str(tmp_path), separator="\\n%%\\n").pieces())) == ["one", "two"]


ROWS = b'{"text": "good"}\n{"text": null}\n{"text": ""}\n{"text": " \\n"}\n{"text": 5}\n{broken\n\n[1]\n{"x": 1}\n{"text": "\\ud800"}\n'
ROWS += b'"text"\n{"text": "\xff"}\n{"text": "gut: \xc3\xb6"}\n{"text": null}\n'
SKIPPED = {"null": 3, "empty": 2, "broken": 6}


def test_rows_without_text_are_skipped_and_counted_in_the_manifest(tmp_path: Path, empty_home: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(ROWS)
    reasons = [p.skipped for p in read_file(file)]
    assert {r: reasons.count(r) for r in SKIPPED} == SKIPPED
    assert documents(list(read_file(file))) == ["good", "gut: ö"]
    splits = prepare(config_of(file, "byte", validation_fraction=0.3)).manifest["splits"]
    counted = {r: sum(s["skipped"].get(r, 0) for s in splits.values()) for r in SKIPPED}
    assert counted == SKIPPED, "each once, those behind the last text too"
    assert splits["train"]["documents"] + splits["val"]["documents"] == 3, "two texts, of which the second is cut"


def test_csv_rows_without_text_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'id,text\n1,good\n2,\n3\n\n4," "\n5,"a, ""b""\nc"\n6,\xff\n')
    found = list(read_file(file))
    assert documents(found) == ["good", 'a, "b"\nc']
    assert [p.skipped for p in found] == ["", "empty", "null", "empty", "", "broken"]


def test_parquet_rows_without_text_are_skipped(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xed\xa0\x80", None, b"", b" \n", "gut: ö".encode()]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = list(read_file(tmp_path / "a.parquet"))
    assert [p.skipped for p in found] == ["", "broken", "null", "empty", "empty", ""]
    assert documents(found) == ["good", "gut: ö"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_names_those_that_exist(tmp_path: Path, kind: str, compression: str) -> None:
    file = write(tmp_path, f"a{kind}{compression}", TEXTS)
    with pytest.raises(ConfigError, match=r"there is no column 'body'; there are id, text \(data\.corpus\.column\)") as error:
        list(read_file(file, column="body"))
    assert str(file) in str(error.value)
    assert documents(list(read_file(write(tmp_path, f"b{kind}", TEXTS), column="text"))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.csv.zst", "a.parquet", "a.parquet.gz", "a.parquet.zst"])
def test_a_truncated_file_is_named(tmp_path: Path, empty_home: Path, name: str) -> None:
    file = write(tmp_path, name, [f"{i} {i * 7919}" for i in range(2000)])
    content = file.read_bytes()
    for size in (len(content) // 2, len(content) - 3):
        file.write_bytes(content[:size])
        with pytest.raises(DataError, match="damaged") as error:
            list(read_file(file))
        assert str(file) in str(error.value)
        assert error.value.code == 3
    with pytest.raises(DataError, match="damaged"):
        prepare(config_of(file, "byte"))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"plain words, and no header of anything")
    with pytest.raises(DataError, match=name):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a{kind}"
    file.write_bytes(b"\xef\xbb\xbf" + {".csv": b"text,id\nhallo,1\n", ".jsonl": b'{"text": "hallo"}\n', ".txt": b"hallo"}[kind])
    assert documents(list(read_file(file))) == ["hallo"]


def test_a_csv_field_may_be_large(tmp_path: Path) -> None:
    text = "lang, \n" * 100_000
    assert documents(list(read_file(write(tmp_path, "a.csv", [text, "short"])))) == [text, "short"]


def test_a_large_row_and_many_rows_are_the_same_compressed_or_not(tmp_path: Path, empty_home: Path) -> None:
    texts = [f"{i}: " + "wort " * (i % 50) for i in range(500)] + ["z" * 100_000]
    made = [prepare(config_of(write(tmp_path, name, texts), "byte")) for name in ("a.jsonl", "b.parquet.zst", "c.csv.gz")]
    assert ids_of(made[0]) == ids_of(made[1]) == ids_of(made[2])
    assert len({m.hash for m in made}) == 1, "the same text, whatever the files"


def test_json_that_is_no_rows_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"text": "hi there"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: as text this is JSON and no prose; give rows, one object a line, as \.jsonl"):
        list(read_file(file))
