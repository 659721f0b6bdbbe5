"""What the lab's AWS was asked to change, as CloudTrail would have it: one JSON line a request, on disk before it acts.

``{"t": monotonic seconds, "wall": unix seconds, "method", "path", "target", "body"}``. Requests that
only read are left out, and so is what may hold a secret: headers, and all bodies but those of Route 53.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

LIMIT = 64 * 1024
"""Bytes of a request's body that are kept."""
ROUTE53 = "/2013-04-01/"
READING = ("Get", "List", "Describe", "Head")


def changes(method: str, target: str, body: str) -> bool:
    """Whether a request may change something. target: the action of AWS' JSON protocols, else empty."""
    if target:
        return not target.rpartition(".")[2].startswith(READING)
    action = next((part[7:] for part in body.split("&") if part.startswith("Action=")), "")
    return method not in ("GET", "HEAD", "OPTIONS") and not (action and action.startswith(READING))


class Trail:
    """A WSGI application that notes changes, then lets another one do them."""

    def __init__(self, application: Application, file: Path) -> None:
        self.application, self.file = application, file
        self._mutex = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if 0 < length <= LIMIT:
            body = environ["wsgi.input"].read(length)
            environ["wsgi.input"] = io.BytesIO(body)
        else:
            body = b""
        method, target = environ["REQUEST_METHOD"], environ.get("HTTP_X_AMZ_TARGET", "")
        text = body.decode("utf-8", "replace")
        if changes(method, target, text):
            path = environ.get("PATH_INFO", "")
            entry = {"t": time.monotonic(), "wall": time.time(), "method": method, "path": path, "target": target}
            with self._mutex, self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**entry, "body": text if path.startswith(ROUTE53) else ""}) + "\n")
        return self.application(environ, start_response)
