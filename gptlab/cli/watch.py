"""`gptlab watch STUDY`: the page of a study, on this machine, while its runs go on."""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gptlab.config.errors import ConfigError, GptlabError
from gptlab.runner.run import find_study
from gptlab.study.compare import compare, gather
from gptlab.study.page import page
from gptlab.tracker.console import say

ADDRESS = "127.0.0.1"
RELOAD = 10  # seconds after which the page is loaded again
FRESH = 2.0  # seconds for which it is not made again


class Watch(ThreadingHTTPServer):
    """Serves the page of one study to this machine alone."""

    daemon_threads = True

    def __init__(self, study: str, port: int, baseline: str | None = None) -> None:
        """Raises ConfigError where there is no such study, or the port cannot be had."""
        self.study, self.baseline = find_study(study), baseline
        self._made, self._page, self._making = 0.0, b"", threading.Lock()
        self.page()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port} cannot be had ({error}); give another, or 0 for a free one") from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def page(self) -> bytes:
        """The page as it is now, made anew at most every few seconds."""
        with self._making:
            if time.monotonic() - self._made > FRESH:
                begun = any(arm.runs for arm in gather(self.study)[0])
                found = compare(self.study, baseline=self.baseline) if begun else None
                self._page = page(self.study, found, live=True).encode()
                self._made = time.monotonic()
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: Watch

    def do_GET(self) -> None:
        # another site's name that leads here (DNS rebinding) must not read the page
        if self.headers.get("Host") not in (f"{ADDRESS}:{self.server.port}", f"localhost:{self.server.port}"):
            self._answer(HTTPStatus.FORBIDDEN, b"this page is for the machine it runs on\n", "text/plain")
        elif self.path.partition("?")[0] != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"there is one page: /\n", "text/plain")
        else:
            try:
                self._answer(HTTPStatus.OK, self.server.page(), "text/html")
            except GptlabError as error:  # runs of other data have joined the study
                self._answer(HTTPStatus.CONFLICT, f"{error}\n".encode(), "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Refresh", str(RELOAD))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line a reload would hide what the terminal has to say."""


def watch(study: str, *, port: int, baseline: str | None) -> None:
    """Serve until Ctrl-C."""
    with Watch(study, port, baseline) as server:
        say(f"http://{ADDRESS}:{server.port}", (f"  {server.study}, loaded again every {RELOAD} s; Ctrl-C ends it", "dim"))
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
