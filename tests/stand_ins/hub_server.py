"""A loopback server that speaks enough of the Hugging Face hub for its real clients, and that fails when asked to.

Repositories are read, and models written to: made, uploaded (small files in the commit, large ones by LFS) and committed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import tempfile
import threading
import urllib.parse
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "a" * 40
DATA = (".parquet", ".jsonl")


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    """The commits of a repository, oldest first: each a folder. With `members` it is gated: only these tokens may read its files."""

    commits: dict[str, Path]
    members: frozenset[str] | None = None

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


@dataclass
class Faults:
    """What goes wrong with the next requests for data files."""

    unavailable: int = 0  # so many of them answer 503
    drops: deque[int] = field(default_factory=deque)  # the connection of one each breaks off after so many bytes of its body


class Server(ThreadingHTTPServer):
    """Holds the repositories by kind and name (`datasets/owner/name`); `url` is where a client finds it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.running = False
        self.lock = threading.Lock()
        self.writers: dict[str, str] = {}  # token -> the account that may write
        self.large: dict[str, bytes] = {}  # what was uploaded by LFS, by its sha256

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, folder: Path, commit: str = COMMIT, members: frozenset[str] | None = None) -> None:
        """A new commit at the head of the data set `name` (`models/owner/name`: of a model)."""
        known = self.repositories.setdefault(name if name.startswith("models/") else f"datasets/{name}", Repository({}, members))
        known.commits[commit] = folder

    def data_requests(self) -> list[Request]:
        """The requests that read a data file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(DATA)]

    def switch_on(self) -> None:
        if self.socket.fileno() < 0:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
        self.running = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def switch_off(self) -> None:
        """Answer nobody: new connections are refused, and those that are open break off at their next request."""
        if self.running:
            self.running = False
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def do_HEAD(self) -> None:
        self._reply()

    def do_PUT(self) -> None:
        self._reply()

    def _reply(self) -> None:
        body = self._body()
        if not self.server.running:
            self.close_connection = True
            return None
        address = urllib.parse.urlparse(self.path)
        path, query = urllib.parse.unquote(address.path), urllib.parse.parse_qs(address.query)
        self.server.requests.append(Request(self.command, path, self.headers.get("Range")))
        if self._writes(path, body):
            return None
        if asked := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path):
            name, what, revision, inside = asked.groups()
            found = self._find(name, revision or "main")
            return self._about(name, what, (inside or "").strip("/"), query, body, *found) if found else None
        if asked := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name = f"{asked[1] or 'models/'}{asked[2]}"
            found = self._find(name, asked[3])
            return self._file(name, asked[4], *found) if found else None
        return self._fail(404, "")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _writes(self, path: str, body: bytes) -> bool:
        """Answer a request that writes, or leads up to it."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/repos/create":
            made = json.loads(body)
            owner = made.get("organization") or self.server.writers.get(token)
            if token not in self.server.writers or owner != self.server.writers[token]:
                self._fail(403 if token else 401, "")
                return True
            name = f"models/{owner}/{made['name']}"
            exists = name in self.server.repositories
            if not exists:
                self.server.repositories[name] = Repository({COMMIT: Path(tempfile.mkdtemp())})
            address = {"url": f"{self.server.url}/{owner}/{made['name']}", "private": made.get("private")}
            self._json(address, code=409 if exists else 200)
            return True
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return True
        if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            sizes = json.loads(body)["files"]
            self._json({"files": [{**f, "uploadMode": "lfs" if f["size"] > 5000 else "regular", "shouldIgnore": False} for f in sizes]})
            return True
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            action = {"upload": {"href": f"{self.server.url}/lfs/", "header": {}}}
            objects = [{**o, "actions": {"upload": {**action["upload"], "href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in wanted]
            self._json({"transfer": "basic", "objects": objects})
            return True
        if path.startswith("/lfs/"):
            self.server.large[path.removeprefix("/lfs/")] = body
            self._json({})
            return True
        if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            folder = self.server.repositories[f"models/{asked[1]}"].commits[COMMIT]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (folder / value["path"]).write_bytes(self.server.large[value["oid"]])
            self._json({"commitUrl": f"{self.server.url}/{asked[1]}/commit/{COMMIT}", "commitOid": COMMIT, "commitMessage": ""})
            return True
        return False

    def _find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit of a revision and its folder, or an answer that there is none."""
        known = self.server.repositories.get(name)
        if known is None:
            self._fail(401, "RepoNotFound")  # as the hub does: whether it is private or missing is not told
            return None
        commit = known.head if revision == "main" else revision
        if commit not in known.commits:
            self._fail(404, "RevisionNotFound")
            return None
        return commit, known.commits[commit]

    def _about(self, name: str, what: str | None, inside: str, query: dict[str, list[str]], body: bytes, commit: str, folder: Path) -> None:
        files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        entries = [{"type": "file", "oid": _digest(commit, path), "size": size, "path": path} for path, size in files.items()]
        folders = sorted({str(parent) for path in files for parent in Path(path).parents} - {"."})
        entries += [{"type": "directory", "oid": _digest(commit, path), "size": 0, "path": path} for path in folders]
        if what == "tree":
            below = [e for e in entries if str(e["path"]).startswith(f"{inside}/" if inside else "")]
            if not below:
                return self._fail(404, "EntryNotFound")
            if query.get("recursive", ["false"])[0].lower() not in ("1", "true"):
                below = [e for e in below if str(Path(str(e["path"])).parent) == (inside or ".")]
            return self._json(below)
        if what == "paths-info":
            form = json.loads(body) if body[:1] == b"{" else urllib.parse.parse_qs(body.decode())
            wanted = form.get("paths", [])
            return self._json([e for e in entries if e["path"] in ([wanted] if isinstance(wanted, str) else wanted)])
        about = {"_id": "1", "id": name.split("/", 1)[1], "sha": commit, "private": False, "disabled": False, "downloads": 0, "likes": 0}
        about |= {"gated": "auto" if self.server.repositories[name].members is not None else False, "tags": [], "cardData": {}}
        about |= {"siblings": [{"rfilename": path} for path in files], "createdAt": "2026-01-01T00:00:00.000Z"}
        return self._json(about)

    def _file(self, name: str, path: str, commit: str, folder: Path) -> None:
        members = self.server.repositories[name].members
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if members is not None and token not in members:
            return self._fail(403 if token else 401, "GatedRepo")
        file, keep = folder / path, None
        if not file.is_file():
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        with self.server.lock:
            if self.command == "GET" and path.endswith(DATA):
                if self.server.faults.unavailable:
                    self.server.faults.unavailable -= 1
                    return self._fail(503, "")
                keep = self.server.faults.drops.popleft() if self.server.faults.drops else None
        size = file.stat().st_size
        first, last, code = 0, size - 1, 200
        about = {"ETag": f'"{_digest(commit, path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last, code = int(part[1]), min(int(part[2] or last), last), 206
            about["Content-Range"] = f"bytes {first}-{last}/{size}"
        about |= {"Content-Length": str(last - first + 1), "Content-Type": "application/octet-stream"}
        self._head(code, about)
        if self.command == "HEAD":
            return None
        with file.open("rb") as opened:
            opened.seek(first)
            content = opened.read(last - first + 1)
        self.wfile.write(content if keep is None else content[:keep])
        self.close_connection = self.close_connection or keep is not None
        return None

    def _fail(self, code: int, reason: str, more: Mapping[str, str] | None = None) -> None:
        about = {"Content-Length": "0", **({"X-Error-Code": reason} if reason else {}), **(more or {})}
        self._head(code, about)

    def _json(self, content: Any, *, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self._head(code, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, code: int, about: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()


def _digest(commit: str, path: str) -> str:
    return hashlib.sha1(f"{commit}:{path}".encode()).hexdigest()


def write_repository(
    folder: Path,
    sets: Mapping[str, Mapping[str, Sequence[str | None]]],
    *,
    files: int = 3,
    row_group: int = 10,
    suffix: str = ".parquet",
) -> Path:
    """A data set repository shaped like FineWeb-Edu: texts by config and split, in so many files of row groups of so many rows."""
    header = ["---", "license: odc-by", "configs:"]
    for config, splits in sets.items():
        header += [f"- config_name: {config}", "  data_files:"]
        for split, texts in splits.items():
            place = f"{config.replace('-', '/')}/{split}"
            header += [f"  - split: {split}", f"    path: {place}/*"]
            (folder / place).mkdir(parents=True, exist_ok=True)
            share = -(-len(texts) // files)
            for number in range(files):
                rows = range(number * share, min((number + 1) * share, len(texts)))
                _write_file(folder / place / f"{number:03d}_00000{suffix}", config, rows, texts, row_group)
    (folder / "README.md").write_text("\n".join([*header, "---", "# Texts for tests", ""]), encoding="utf-8")
    return folder


def _write_file(file: Path, config: str, rows: range, texts: Sequence[str | None], row_group: int) -> None:
    columns: dict[str, Any] = {
        "text": pa.array([texts[i] for i in rows], pa.string()),
        "id": [f"<urn:uuid:{config}-{i:08d}>" for i in rows],
        "url": [f"https://example.org/{config}/{i}" for i in rows],
        "language_score": [0.9 + i % 10 / 100 for i in rows],
        "token_count": [len(texts[i] or "") // 4 for i in rows],
        "score": [2.5 + i % 5 / 2 for i in rows],
        "int_score": [3 + i % 3 for i in rows],
    }
    table = pa.table(columns)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=row_group)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")


@contextlib.contextmanager
def hub_server() -> Iterator[Server]:
    """A server that is up inside the block."""
    server = Server()
    server.switch_on()
    try:
        yield server
    finally:
        server.switch_off()
