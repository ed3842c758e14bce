"""Who may ask: the right name of the server, no other site's page, and the token where there is one."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptlab.generate.server.errors import Refused

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def is_local(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return address in LOCAL or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets through what may ask, and gives every answer its headers.

    A server of this machine alone answers to the machine's own names: another site's name that leads here (DNS rebinding) is refused. One
    that others reach answers to `hosts` and to plain addresses, which no other site can take, and to nobody without the `token`.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] = (), local: bool = True, token: str | None = None) -> None:
        self.app, self.local, self.token = app, local, token
        self.hosts = LOCAL | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except Refused as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._answers_to(host):
            raise Refused(403, "this server does not answer to that host name; `gptlab serve --allow-host NAME` lets it", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Refused(403, "pages of other origins may not ask this server", code="origin")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            raise Refused(403, "pages of other origins may not ask this server", code="origin")
        if self.token is not None and scope["path"].startswith("/v1/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                raise Refused(401, "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`", code="invalid_api_key")

    def _answers_to(self, host: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not self.local or is_local(name)


def _name(host: str) -> str | None:
    """The name of a Host header, without its port; None where it is none."""
    name, rest = host, ""
    if host.startswith("["):
        name, closed, rest = host[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            return None
        rest = rest[1:]
    elif ":" in host:
        name, _, rest = host.partition(":")
    return name.lower().rstrip(".") if name and (not rest or rest.isdecimal()) else None
