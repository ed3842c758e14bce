"""The page: one document without anything from the network, under a policy that runs its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("store.js", "api.js", "tokens.js", "view.js", "page.js")


def page() -> tuple[bytes, str]:
    """The document, and its content security policy: script and style by their hashes, requests to this server alone, and no text that
    becomes markup (trusted types)."""
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    script = "".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    body = (ASSETS / "page.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    made = body.replace("{{style}}", style).replace("{{script}}", script)
    return made.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
