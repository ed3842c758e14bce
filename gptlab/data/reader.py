"""Files of text: plain text, and rows of JSON lines, Parquet and CSV, each plain or compressed, read in pieces of bounded size."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from gptlab.config.errors import ConfigError, DataError, IOFailure

PIECE = 1 << 20  # bytes read at a time
PLAIN, ROWS, COMPRESSED = (".txt", ".md"), (".jsonl", ".parquet", ".csv"), {".gz": "gzip", ".zst": "zstd"}


class Piece(NamedTuple):
    """A part of a document. `skipped` says why a row of the source gave no text (empty, null, broken); such a piece has none."""

    text: str
    last: bool  # whether it ends its document
    skipped: str = ""


def text_files(spec: str, key: str) -> list[Path]:
    """A file, the files of a folder and what lies below it, or those of a glob (`books/**/*.txt`), sorted.

    Raises ConfigError if nothing is there, DataError if a folder holds no text.
    """
    path = Path(spec).expanduser()
    if not path.exists() and glob.has_magic(spec):
        found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not found:
            raise ConfigError(f"{key}={spec}: no file matches")
        return found
    if not path.exists():
        raise ConfigError(f"{key}={spec}: there is no such file or folder")
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if kind_of(f) in (*PLAIN, *ROWS) and f.is_file() and f.stat().st_size)
    if not found:
        raise DataError(f"{path} holds no {', '.join((*PLAIN, *ROWS))} file (or such a one with .gz or .zst) with text in it")
    return found


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, that of the compression left out: `.jsonl` of `a.jsonl.gz`."""
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def read_file(file: Path, *, column: str = "text", separator: str = "") -> Iterator[Piece]:
    """The documents of a file: rows of `column`, or plain text, cut into documents at `separator` where there is one.

    Raises ConfigError (no such column), DataError (empty, binary, not UTF-8, damaged, JSON that is no rows) or IOFailure.
    """
    kind = kind_of(file)
    try:
        if kind == ".parquet":
            yield from _parquet_rows(file, column)
        elif kind == ".jsonl":
            yield from _json_rows(file, column)
        elif kind == ".csv":
            yield from _csv_rows(file, column)
        elif kind == ".json":
            raise DataError(f"{file}: as text this is JSON and no prose; give rows, one object a line, as .jsonl; data=chat reads chats")
        elif separator:
            yield from _split(read_text(file), separator)
        else:
            yield from read_text(file)
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise DataError(f"{file} is damaged or not what its name says ({' '.join(str(error).split())[:150]})") from error
        raise IOFailure(f"{file} could not be read: {error.strerror}") from error


def _opened(file: Path) -> IO[bytes]:
    """The file's bytes, decompressed. A lone .gz or .zst of several members is read to its end."""
    compression = COMPRESSED.get(file.suffix.lower())
    if compression is None:
        return file.open("rb")
    import pyarrow as pa

    return io.BufferedReader(_Readable(pa.CompressedInputStream(pa.OSFile(str(file)), compression)), PIECE)


class _Readable(io.RawIOBase):
    """An Arrow stream as a Python one."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content: bytes = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.stream.close()
        super().close()


def read_text(file: Path) -> Iterator[Piece]:
    """A UTF-8 file as one document (a byte-order mark is no text). Raises DataError if it is empty, binary or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held = ""  # one piece behind, so that the last one can be told
    at = 0
    try:
        with _opened(file) as raw:
            while chunk := raw.read(PIECE):
                if at == 0 and b"\0" in chunk[:8192]:
                    raise DataError(
                        f"{file} is a binary file; gptlab reads UTF-8 text (iconv -f utf-16 -t utf-8 converts Windows' Unicode)"
                    )
                text = _decode(decoder, chunk, at, file)
                text = text.removeprefix("\ufeff") if at == 0 else text
                at += len(chunk)
                if held and text:
                    yield Piece(held, False)
                held = text or held
        if tail := _decode(decoder, b"", at, file):
            held += tail
    except OSError as error:
        if error.errno is None:
            raise DataError(f"{file} is damaged: {' '.join(str(error).split())[:150]}") from error
        raise IOFailure(f"{file} could not be read: {error.strerror}") from error
    if not held:
        raise DataError(f"{file} is empty")
    yield Piece(held, True)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, at: int, file: Path) -> str:
    pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} at offset {at - pending + error.start}"
        raise DataError(f"{file} is not UTF-8: {place} ({error.reason}); convert it, as with iconv -t utf-8") from error


def _split(pieces: Iterator[Piece], separator: str) -> Iterator[Piece]:
    """One long text as the documents between its separators. A document with nothing but white space is skipped.

    Where the separator has a new line, new lines of Windows become plain ones, so that it is found.
    """
    held, begun = "", False  # begun: a part of this document has gone out
    for piece in pieces:
        held += piece.text
        if "\n" in separator and "\r" not in separator:
            held = held.replace("\r\n", "\n")
        *whole, held = held.split(separator)
        if piece.last:
            whole.append(held)
        for place, text in enumerate(whole):
            if text.strip() or begun:
                yield Piece(text, True)
            elif not (piece.last and place == len(whole) - 1):  # after a file's last separator comes no document
                yield Piece("", False, "empty")
            begun = False
        safe = len(held) - len(separator) + 1  # what follows may be the beginning of a separator
        if not piece.last and safe >= PIECE:
            yield Piece(held[:safe], False)
            held, begun = held[safe:], True


def row_piece(value: Any) -> Piece:
    """A row's text as a document, or why it has none."""
    if value is None:
        return Piece("", False, "null")
    if not isinstance(value, str):
        return Piece("", False, "broken")
    if not value or value.isspace():
        return Piece("", False, "empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return Piece("", False, "broken")
    return Piece(value, True)


def _json_rows(file: Path, column: str) -> Iterator[Piece]:
    with _opened(file) as lines:
        known = False  # whether a row had the column
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # UnicodeDecodeError is one
                yield Piece("", False, "broken")
                continue
            if not isinstance(row, dict):
                yield Piece("", False, "broken")
                continue
            if not known and column not in row:
                raise ConfigError(f"{file}, line {number}: there is no column {column!r}; there are {', '.join(row)} (data.corpus.column)")
            known = True
            yield row_piece(row.get(column))


def _csv_rows(file: Path, column: str) -> Iterator[Piece]:
    csv.field_size_limit(1 << 30)
    with _opened(file) as raw:
        # What is no UTF-8 becomes a lone surrogate, by which `row_piece` knows it.
        rows = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline=""))
        try:
            header = next(rows, [])
            if column not in header:
                raise ConfigError(f"{file}: there is no column {column!r}; there are {', '.join(header)} (data.corpus.column)")
            place = header.index(column)
            for row in rows:
                if row:
                    yield row_piece(row[place] if len(row) > place else None)
        except csv.Error as error:
            raise DataError(f"{file}, line {rows.line_num}: {error}") from error


def _parquet_rows(file: Path, column: str) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _seekable(file) as raw, pq.ParquetFile(raw) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise ConfigError(f"{file}: there is no column {column!r}; there are {', '.join(names)} (data.corpus.column)")
            for batch in opened.iter_batches(batch_size=256, columns=[column], use_threads=False):
                try:
                    values = batch.column(0).to_pylist()
                except UnicodeDecodeError:  # find the row
                    values = [_value(v) for v in batch.column(0)]
                for value in values:
                    yield row_piece(value)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is damaged or no Parquet file ({' '.join(str(error).split())[:150]})") from error


@contextmanager
def _seekable(file: Path) -> Iterator[IO[bytes]]:
    """A file that can be read anywhere, as Parquet is: a compressed one is unpacked into a temporary file."""
    with _opened(file) as raw:
        if file.suffix.lower() not in COMPRESSED:
            yield raw
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(raw, unpacked, PIECE)
            unpacked.seek(0)
            yield unpacked


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""  # no str: broken
