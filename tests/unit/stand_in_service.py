"""The stand-in's program as a module, and a store in memory for it: what several tests put behind a port."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

SOURCE = (
    Path(__file__).resolve().parents[2]
    / "collections/ansible_collections/censuschat/infra/roles/stand_in/files/stand_in.py"
)
spec = importlib.util.spec_from_file_location("stand_in", SOURCE)
assert spec is not None
assert spec.loader is not None
stand_in: Any = importlib.util.module_from_spec(spec)
sys.modules["stand_in"] = stand_in
spec.loader.exec_module(stand_in)


class Memory:
    """A store in memory that can be made to fail."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.broken: str | None = None

    def _check(self) -> None:
        if self.broken:
            raise stand_in.Unavailable(self.broken)

    def write(self, client: str, n: int) -> int:
        self._check()
        if n in self.rows.setdefault(client, []):
            raise stand_in.Conflict("the row exists")
        self.rows[client].append(n)
        return 3

    def numbers(self, client: str) -> list[int]:
        self._check()
        return self.rows.get(client, [])

    def probe(self) -> int:
        self._check()
        return 3
