"""Rows of text out of a data set's files, with cursors to go on from, read ahead of who wants them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from queue import Full, Queue
from typing import Any, NamedTuple, TypeVar

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import suggest
from gptlab.data.corpus import Cursor

T = TypeVar("T")
BATCH = 4 << 20  # bytes of text decoded at once
BLOCK = 8 << 20  # bytes asked of the hub at once
AHEAD = 8  # batches read before they are wanted, so that the network and the tokeniser work at the same time
PARTING = 10.0  # seconds a request under way may take to end


class Rows(NamedTuple):
    """Rows of the text column, and where they stand: a cursor is `place` with the number of rows passed behind it."""

    place: dict[str, Any]
    first: int  # rows between the place and these
    values: Any  # a pyarrow array


def check_column(called: str, column: str, schema: Any) -> None:
    """Raise ConfigError unless a table has the column and it holds text."""
    import pyarrow.types as kinds

    def is_text(kind: Any) -> bool:
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        return any(check(kind) for check in (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null))

    texts = [field.name for field in schema if is_text(field.type)]
    if column not in schema.names:
        raise ConfigError(f"data.corpus.column={column}: {called} has the columns {', '.join(schema.names)}{suggest(column, schema.names)}")
    if column not in texts:
        kind = schema.field(column).type
        raise ConfigError(f"data.corpus.column={column}: it holds {kind}, not text; {called} has text in {', '.join(texts) or 'no column'}")


def from_parquet(files: list[str], called: str, column: str, cursor: Cursor) -> Iterator[Rows]:
    """Rows of parquet files. A cursor names a row group, so going on reads that group again and nothing before it.

    `datasets` has the same rows in the same order, but goes on by reading a file from its beginning: of FineWeb-Edu, 2 GB.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    start, group_start, passed = (cursor["file"], cursor["group"], cursor["row"]) if cursor else (0, 0, 0)
    if cursor and not (start < len(files) and files[start].endswith(cursor["path"])):
        raise DataError(f"{cursor['path']} is not file {start} of {len(files)} any more; what was prepared of {called} cannot go on")
    for number in range(start, len(files)):
        path = files[number].split("@", 1)[-1].split("/", 1)[-1]
        try:
            with hub.open(files[number], "rb", block_size=BLOCK) as opened:
                # In small reads, which the file system above gathers: a column of a row group may be half a gigabyte.
                parquet = pq.ParquetFile(opened, buffer_size=1 << 20)
                check_column(called, column, parquet.schema_arrow)
                for group in range(group_start, parquet.num_row_groups):
                    rows = max(1, min(4096, BATCH // _row_bytes(parquet.metadata.row_group(group), column)))
                    at = 0
                    for batch in parquet.iter_batches(rows, [group], [column], use_threads=False):
                        values = batch.column(column)
                        if passed < at + len(values):
                            place = {"file": number, "path": path, "group": group}
                            yield Rows(place, max(at, passed), values.slice(max(0, passed - at)))
                        at += len(values)
                    passed = 0
                group_start = 0
        except (pa.ArrowException, OSError) as error:
            # Arrow tells of broken bytes with either; the network's own errors are of other kinds and pass.
            if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
                raise DataError(f"{files[number]} is not a sound parquet file ({' '.join(str(error).split())[:200]})") from error
            raise


def _row_bytes(group: Any, column: str) -> int:
    """Bytes of a column in a row group, for each row."""
    parts = (group.column(i) for i in range(group.num_columns))
    size = next((int(part.total_uncompressed_size) for part in parts if part.path_in_schema == column), BATCH)
    return max(1, size // max(1, int(group.num_rows)))


def from_stream(builder: Any, split: str, called: str, column: str, cursor: Cursor) -> Iterator[Rows]:
    """Rows of files of another kind (JSON lines, CSV …), by the state of `datasets`: going on reads a file from its beginning."""
    stream = builder.as_streaming_dataset(split=split).with_format("arrow")
    passed = 0
    if cursor:
        passed = cursor["row"]
        if cursor["state"] is not None:
            stream.load_state_dict(cursor["state"])
    state = cursor["state"] if cursor else None
    for table in stream.iter(batch_size=256):
        check_column(called, column, table.schema)
        values = table.column(column).combine_chunks()
        if passed < len(values):
            yield Rows({"state": state}, passed, values.slice(passed))
        state, passed = stream.state_dict(), max(0, passed - len(values))


def texts_of(values: Any) -> list[str | bytes | None]:
    """The values of an arrow array; what is no UTF-8 as bytes."""
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        return [_text(value) for value in values]


def _text(value: Any) -> str | bytes | None:
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError:
        return b""
    return text


def ahead(source: Generator[T, None, None], closed: threading.Event) -> Generator[T, None, None]:
    """The items of an iterator, which a thread of its own reads up to AHEAD before they are wanted; closing this ends the thread."""
    ready: Queue[tuple[T] | BaseException | None] = Queue(AHEAD)

    def hand(item: tuple[T] | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def read() -> None:
        try:
            with closing(source) as items:
                if all(hand((item,)) for item in items):
                    hand(None)
        except BaseException as error:
            hand(error)

    thread = threading.Thread(target=read, name="gptlab-rows", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        closed.set()
        thread.join(PARTING)
