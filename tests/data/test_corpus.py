"""Corpora: the user's files are read as they are, and what cannot be read is told; downloads are checked before they are kept."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.data import reader
from gptlab.data.corpus import PyDocs, Shakespeare, Text, module_documentation
from gptlab.data.reader import read_text


def whole(file: Path) -> str:
    return "".join(text for text, *_ in read_text(file))


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_a_file_is_read_as_it_is_whatever_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(reader, "PIECE", piece)
    text = "aé日👩\r\nx\ry\n\u2028z"
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    pieces = list(read_text(file))
    assert "".join(t for t, *_ in pieces) == text
    assert [last for _, last, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    if piece >= 3:
        assert whole(file) == text, "a byte-order mark is no text"


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
def test_bytes_that_are_not_utf8_are_told_with_their_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(reader, "PIECE", piece)
    file = tmp_path / "latin.txt"
    file.write_bytes("日本\nab".encode() + b"\xe9t\xe9")
    with pytest.raises(DataError) as error:
        whole(file)
    assert f"{file} is not UTF-8: byte 0xe9 at offset 9 (" in str(error.value)
    assert "iconv" in str(error.value)
    assert error.value.code == 3
    file.write_bytes(b"abc\xe6\x97")
    with pytest.raises(DataError, match=r"byte 0xe6 at offset 3 \(unexpected end of data\)"):
        whole(file)


def test_an_empty_a_binary_and_an_unreadable_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.txt is empty"):
        whole(file)
    file.write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"x\.txt is a binary file; gptlab reads UTF-8 text"):
        whole(file)
    file.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="is a binary file"):
        whole(file)
    file.unlink()
    with pytest.raises(IOFailure, match=r"x\.txt could not be read: No such file"):
        whole(file)


def test_a_path_that_is_not_there_is_a_config_error() -> None:
    for make in (Text, Shakespeare):
        with pytest.raises(ConfigError, match=r"data\.corpus\.path=nowhere\.txt: there is no such file") as error:
            make(path="nowhere.txt")
        assert error.value.code == 2


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "B"), ("a.md", "A"), ("sub/c.TXT", "C"), ("no.py", "N"), ("empty.txt", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(Text(path=str(tmp_path)).pieces()) == [("A", True, ""), ("B", True, ""), ("C", True, "")]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("x")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no .*file"):
        Text(path=str(tmp_path))


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = Text(path=str(file)).fingerprint()
    assert Text(path=str(file)).fingerprint() == before
    file.write_text("two!")
    assert Text(path=str(file)).fingerprint() != before
    os.utime(file, ns=(1, 1))
    assert Text(path=str(file)).fingerprint() != before


class _Answer(BaseHTTPRequestHandler):
    content = b""
    promised = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.promised or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Answer]]]:
    handler = type("Handler", (_Answer,), {})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/input.txt", handler
        server.shutdown()
        thread.join()


def _files(folder: Path) -> list[str]:
    return [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]


def test_shakespeare_is_fetched_once_and_kept(
    server: tuple[str, type[_Answer]], empty_home: Path, shared_text: Callable[[str], Path]
) -> None:
    url, handler = server
    handler.content = shared_text("tinyshakespeare.txt").read_bytes()
    fresh = Shakespeare(url=url)
    before = fresh.fingerprint()
    assert sum(len(text) for text, *_ in fresh.pieces()) == 1_115_394
    assert fresh.fingerprint() == before
    assert _files(empty_home) == ["downloads/tinyshakespeare.txt"]
    handler.content = b"not asked again"
    assert sum(len(text) for text, *_ in Shakespeare(url=url).pieces()) == 1_115_394


def test_a_download_with_another_sha_is_refused_and_not_kept(server: tuple[str, type[_Answer]], empty_home: Path) -> None:
    url, handler = server
    handler.content = b"something else"
    with pytest.raises(DataError) as error:
        list(Shakespeare(url=url).pieces())
    said = str(error.value)
    assert url in said
    assert hashlib.sha256(b"something else").hexdigest() in said
    assert Shakespeare.SHA256 in said
    assert _files(empty_home) == []


def test_a_download_that_fails_names_the_way_out(server: tuple[str, type[_Answer]], empty_home: Path) -> None:
    url, handler = server
    handler.content, handler.promised = b"cut off", 1000
    for address in (url, "http://127.0.0.1:1/input.txt", "http://nowhere.invalid/x"):
        with pytest.raises(IOFailure, match=r"could not be fetched .*data\.corpus\.path=FILE.*data=pydocs") as error:
            list(Shakespeare(url=address).pieces())
        assert error.value.code == 74
    with pytest.raises(ConfigError, match=r"data\.corpus\.url=x is not an address"):
        list(Shakespeare(url="x").pieces())
    assert _files(empty_home) == []


def test_a_download_that_cannot_be_written_leaves_nothing(
    server: tuple[str, type[_Answer]], empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    handler.content = b"tiny"
    monkeypatch.setattr(Shakespeare, "SHA256", hashlib.sha256(b"tiny").hexdigest())

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(IOFailure, match=r"tinyshakespeare\.txt could not be written \(No space left on device\)"):
        list(Shakespeare(url=url).pieces())
    assert _files(empty_home) == []


@pytest.fixture(scope="module")
def pydocs() -> list[tuple[str, bool]]:
    return list(PyDocs().pieces())


def test_pydocs_is_about_two_million_characters_of_documents(pydocs: list[tuple[str, bool]]) -> None:
    assert 1_500_000 < sum(len(text) for text, *_ in pydocs) < 4_000_000
    assert all(last and text for text, last, _ in pydocs)
    assert len({text for text, *_ in pydocs}) > 0.95 * len(pydocs)
    assert not any("\t" in text or "\r" in text for text, *_ in pydocs if text.startswith("module "))


def test_documentation_is_read_and_never_imported(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text('"""Doc."""\nraise SystemExit\nclass A:\n    "An A."\n    async def f(self, x):\n        "F."\ndef g():\n    "Grün."\n')
    assert module_documentation(file, "m") == "module m\n\nDoc.\n\nclass A\n\nAn A.\n\ndef f(self, x)\n\nF."
    file.write_text("this is ( broken")
    assert module_documentation(file, "m") == ""
