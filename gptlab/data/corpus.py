"""Corpora: where the text comes from. Each gives pieces of documents, again and again the same, in bounded memory."""

from __future__ import annotations

import ast
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
from gptlab.data.reader import ROWS, Piece, kind_of, read_file, read_text, text_files

Cursor = Any  # JSON data that says where in its source a corpus stands; None: at the beginning


class Corpus(Protocol):
    """A source of text. What cannot go on from a cursor is read from its beginning again, and what is known passed over."""

    name: str

    def fingerprint(self) -> dict[str, Any]:
        """What tells this text from another without reading it all: the key under which its shards are kept."""

    def pieces(self) -> Iterator[Piece | tuple[str, bool]]:
        """The text, document by document."""


class Resumable(Corpus, Protocol):
    """A corpus that goes on from a cursor."""

    def pieces_from(self, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
        """The pieces after a cursor, each with the cursor that stands behind it."""


def home() -> Path:
    """The folder of prepared data and downloads: $GPTLAB_HOME, else gptlab in the user's cache folder."""
    given = os.environ.get("GPTLAB_HOME")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptlab"


def file_key(file: Path) -> list[Any]:
    """What tells a file from another, or from itself before it was changed, without reading it."""
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


@register("data/corpus", "none")
class NoText:
    """No text: of a run whose weights came from elsewhere. What needs a text asks for one."""

    name = "none"

    def fingerprint(self) -> dict[str, Any]:
        raise ConfigError("data/corpus=none has no text; choose one, as data=pydocs or data/corpus=text data.corpus.path=FILE")

    def pieces(self) -> Iterator[Piece | tuple[str, bool]]:
        raise ConfigError("data/corpus=none has no text")


@register("data/corpus", "text")
class Text:
    """Your own files: a file, a folder or a glob of .txt, .md, .jsonl, .parquet and .csv, plain or .gz or .zst.

    A row of .jsonl, .parquet and .csv is a document, its text in `column`. A plain file is one document, unless `separator` (\\n is a
    new line) stands between documents.
    """

    name = "text"

    def __init__(self, *, path: str, column: str = "text", separator: str = "") -> None:
        self.files = text_files(path, "data.corpus.path")
        self.path, self.column = path, column
        self.separator = separator.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [file_key(f) for f in self.files], "column": self.column, "separator": self.separator}

    def pieces(self) -> Iterator[Piece]:
        for piece, _ in self.pieces_from(None):
            yield piece

    def pieces_from(self, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
        first, passed = cursor or (0, 0)  # a file's place, and how many of its pieces are known
        documents = 0
        for place in range(first, len(self.files)):
            for count, piece in enumerate(read_file(self.files[place], column=self.column, separator=self.separator), 1):
                documents += piece.last
                if place > first or count > passed:
                    yield piece, [place, count]
        if self.separator and cursor is None and documents == len(self.files) and all(kind_of(f) not in ROWS for f in self.files):
            raise ConfigError(f"data.corpus.separator={self.separator!r} stands nowhere in {self.path}; \\n is a new line")


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

    def __init__(self) -> None:
        self._documents: list[Piece] = []  # parsing the library takes seconds, and its text is small

    def fingerprint(self) -> dict[str, Any]:
        return {"python": sys.version}

    def pieces(self) -> Iterator[Piece]:
        if not self._documents:
            self._documents = list(self._read())
        yield from self._documents

    def _read(self) -> Iterator[Piece]:
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
            yield Piece(documents[name], True)


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
