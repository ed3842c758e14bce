"""Corpora: where the text comes from. Each gives pieces of documents, again and again the same, in bounded memory."""

from __future__ import annotations

import ast
import codecs
import hashlib
import http.client
import os
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import register

PIECE = 1 << 20  # bytes read at a time
Piece = tuple[str, bool]  # text, and whether it ends its document


class Corpus(Protocol):
    """A source of text."""

    name: str

    def fingerprint(self) -> dict[str, Any]:
        """What tells this text from another without reading it all: the key under which its shards are kept."""

    def pieces(self) -> Iterator[Piece]:
        """The text, document by document."""


def home() -> Path:
    """The folder of prepared data and downloads: $GPTLAB_HOME, else gptlab in the user's cache folder."""
    given = os.environ.get("GPTLAB_HOME")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptlab"


def read_text(file: Path) -> Iterator[Piece]:
    """A UTF-8 file as one document (a byte-order mark is no text). Raises DataError if it is empty, binary or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held = ""  # one piece behind, so that the last one can be told
    at = 0
    try:
        with file.open("rb") as raw:
            while chunk := raw.read(PIECE):
                if at == 0 and b"\0" in chunk[:8192]:
                    raise DataError(f"{file} is a binary file; gptlab reads UTF-8 text")
                text = _decode(decoder, chunk, at, file)
                text = text.removeprefix("\ufeff") if at == 0 else text
                at += len(chunk)
                if held and text:
                    yield held, False
                held = text or held
        if tail := _decode(decoder, b"", at, file):
            held += tail
    except OSError as error:
        raise IOFailure(f"{file} could not be read: {error.strerror}") from error
    if not held:
        raise DataError(f"{file} is empty")
    yield held, True


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, at: int, file: Path) -> str:
    pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} at offset {at - pending + error.start}"
        raise DataError(f"{file} is not UTF-8: {place} ({error.reason}); convert it, as with iconv -t utf-8") from error


def file_key(file: Path) -> list[Any]:
    """What tells a file from another, or from itself before it was changed, without reading it."""
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


@register("data/corpus", "text")
class Text:
    """Your own files: one UTF-8 file, or every .txt and .md below a folder."""

    name = "text"

    def __init__(self, *, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ConfigError(f"data.corpus.path={path}: there is no such file or folder")
        self.files = text_files(self.path)

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [file_key(f) for f in self.files]}

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            yield from read_text(file)


def text_files(path: Path) -> list[Path]:
    """The file itself, or every .txt and .md below a folder that is not empty, sorted. Raises DataError if there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".txt", ".md") and f.is_file() and f.stat().st_size)
    if not found:
        raise DataError(f"{path} holds no .txt or .md file with text in it")
    return found


@register("data/corpus", "shakespeare")
class Shakespeare:
    """Tiny Shakespeare (Karpathy's char-rnn): 1,115,394 characters, fetched once and checked, or your own copy by `path`."""

    name = "shakespeare"
    SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def __init__(
        self,
        *,
        path: str = "",
        url: str = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ) -> None:
        self.url = url
        self.file = Path(path).expanduser() if path else home() / "downloads" / "tinyshakespeare.txt"
        if path and not self.file.is_file():
            raise ConfigError(f"data.corpus.path={path}: there is no such file")

    def fingerprint(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"sha256": self.SHA256}
        return {"sha256": hashlib.sha256(self.file.read_bytes()).hexdigest()}

    def pieces(self) -> Iterator[Piece]:
        if not self.file.exists():
            self._fetch()
        yield from read_text(self.file)

    def _fetch(self) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=30) as answer:
                content: bytes = answer.read()
        except ValueError as error:
            raise ConfigError(f"data.corpus.url={self.url} is not an address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise IOFailure(
                f"{self.url} could not be fetched ({getattr(error, 'reason', error)}); "
                "give your own copy with data.corpus.path=FILE, or use data=pydocs, which needs no network"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.SHA256:
            raise DataError(f"{self.url} gave a file with sha256 {found}, not {self.SHA256}; nothing was kept")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.file.parent) as folder:
                partial = Path(folder) / self.file.name
                partial.write_bytes(content)
                partial.replace(self.file)
        except OSError as error:
            raise IOFailure(f"{self.file} could not be written ({error.strerror})") from error


@register("data/corpus", "pydocs")
class PyDocs:
    """The documentation inside the running Python: language topics and the standard library's docstrings, about 2 million characters."""

    name = "pydocs"

    def fingerprint(self) -> dict[str, Any]:
        return {"python": sys.version}

    def pieces(self) -> Iterator[Piece]:
        from pydoc_data.topics import topics

        documents = {f"topic {name}": text.strip() for name, text in topics.items()}
        library = Path(sysconfig.get_path("stdlib"))
        for file in sorted(library.rglob("*.py")):
            parts = file.relative_to(library).parts
            if not {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"} & set(parts):
                text = module_documentation(file, ".".join(parts)[:-3].removesuffix(".__init__"))
                if text:
                    documents[f"module {'.'.join(parts)}"] = text
        # In the order of a hash, so that what is held out is of the same kinds as what is trained on.
        for name in sorted(documents, key=lambda n: hashlib.sha256(n.encode()).digest()):
            yield documents[name], True


def module_documentation(file: Path, name: str) -> str:
    """Every docstring of a module under its signature. The file is parsed, never imported. What is not plain ASCII is left out."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # the library ships files that are broken on purpose
        return ""
    found: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, title: str) -> None:
        text = ast.get_docstring(node)
        if text and text.isascii():
            found.append(f"{title}\n\n{text}")
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                visit(child, f"class {child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"def {child.name}({', '.join(a.arg for a in child.args.args)})")

    visit(tree, f"module {name}")
    return "\n\n".join(found).replace("\t", "    ").replace("\r", "").replace("\f", "")
