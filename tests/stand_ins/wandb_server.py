"""A loopback server that speaks enough of W&B's protocol for the real client to run online against it."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class RecordedRun:
    """What a client sent of one run."""

    settings: dict[str, Any] = field(default_factory=dict)  # the variables of the last upsert
    config: dict[str, Any] = field(default_factory=dict)
    files: defaultdict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.files["wandb-history.jsonl"]
        return [json.loads(lines[i]) for i in sorted(lines)]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.files["wandb-summary.json"]
        return json.loads(lines[max(lines)]) if lines else {}


class Server(ThreadingHTTPServer):
    """Holds the runs; `url` is where a client finds it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, RecordedRun] = {}
        self.artifacts: list[dict[str, Any]] = []  # the variables of each that was created
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.manner = "up"  # or "slow", "silent", "html" (a proxy that wants a login), "forbidden", "gone"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self, name: str) -> RecordedRun:
        return self.runs.setdefault(name, RecordedRun())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _ill(self) -> bool:
        """Whether the request was answered as a server answers that is not well."""
        manner = self.server.manner
        if manner == "slow":
            time.sleep(1)
        elif manner in ("silent", "gone"):  # a connection that stays open without an answer, or is closed
            time.sleep(120 if manner == "silent" else 0)
            self.close_connection = True
            return True
        elif manner in ("html", "forbidden"):
            page = b"<html><body>Please log in</body></html>" if manner == "html" else b'{"errors": [{"message": "permission denied"}]}'
            self.send_response(200 if manner == "html" else 403)
            self.send_header("Content-Type", "text/html" if manner == "html" else "application/json")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return True
        return False

    def do_GET(self) -> None:
        if not self._ill():
            self._answer({})

    def do_PUT(self) -> None:
        self._body()
        if not self._ill():
            self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self._ill():
            return None
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            reply = getattr(self, f"reply_{operation[1]}", None) if operation else None
            return self._answer({"data": reply(request.get("variables") or {}) if reply else {}})
        stream = re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream:
            sent, run = json.loads(body), self.server.run(stream[1])
            for name, content in (sent.get("files") or {}).items():
                for i, line in enumerate(content["content"]):
                    run.files[name][content["offset"] + i] = line
            if "complete" in sent:
                run.exit_code = sent.get("exitcode")
            return self._answer({"exitcode": None, "limits": {}})
        return self._answer({})

    def reply_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "tester", "username": "tester", "email": "", "flags": "{}", "teams": {"edges": []}}}

    def reply_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def reply_RunResumeStatus(self, sent: dict[str, Any]) -> dict[str, Any]:
        known, bucket = self.server.runs.get(sent["name"]), None
        if known is not None and known.settings:
            history = known.files["wandb-history.jsonl"]
            bucket = {
                "id": "B", "name": sent["name"], "displayName": sent["name"], "tags": [], "wandbConfig": json.dumps({"t": 1}),
                "summaryMetrics": json.dumps(known.summary), "config": json.dumps(known.config), "logLineCount": 0,
                "historyLineCount": len(history), "eventsLineCount": 0, "eventsTail": "[]",
                "historyTail": json.dumps([history[i] for i in sorted(history)][-1:]),
            }  # fmt: skip
        return {"model": {"id": "P", "name": sent["project"], "entity": {"id": "E", "name": "tester"}, "bucket": bucket}}

    def reply_UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:
        run = self.server.run(sent["name"])
        new = not run.settings
        run.settings.update({k: v for k, v in sent.items() if v is not None})
        if sent.get("config"):
            run.config = json.loads(sent["config"])
        project = {"id": "P", "name": sent["project"], "entity": {"id": "E", "name": "tester"}}
        shown = sent.get("displayName") or sent["name"]
        bucket = {"id": "B", "name": sent["name"], "displayName": shown, "description": "", "config": json.dumps(run.config)}
        bucket |= {"sweepName": None, "project": project, "historyLineCount": len(run.files["wandb-history.jsonl"])}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def reply_CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.server.url}/blob/{n}"} for n in sent["files"]]
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}

    def reply_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def reply_ProjectInternalId(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "P", "internalId": "UHJvamVjdDox"}}

    def reply_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def reply_CreateArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.server.artifacts.append(sent)
        artifact = {"id": f"A{len(self.server.artifacts)}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def reply_CreateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": self._file("manifest")}}}

    def reply_UpdateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": {"id": "M", "file": self._file("manifest")}}}

    def reply_CreateArtifactFiles(self, sent: dict[str, Any]) -> dict[str, Any]:
        asked = next((v for v in sent.values() if isinstance(v, list)), [])
        more = {"uploadMultipartUrls": None}
        nodes = [{"node": self._file(f["name"]) | more | {"storagePath": f["name"], "artifact": {"id": f["artifactID"]}}} for f in asked]
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def reply_CommitArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": sent.get("artifactID"), "digest": "x"}}}

    def reply_NotifyScriptableRunAlert(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.server.alerts.append(sent)
        return {"notifyScriptableRunAlert": {"success": True}}

    def reply_UpsertView2(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.server.views.append(sent)
        return {"upsertView": {"view": {"id": "W1", "name": sent["name"]}, "inserted": True}}

    def _file(self, name: str) -> dict[str, Any]:
        return {"id": name, "name": name, "displayName": name, "uploadUrl": f"{self.server.url}/blob/{name}", "uploadHeaders": []}


@contextlib.contextmanager
def wandb_server() -> Iterator[Server]:
    """A server that is up inside the block."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
