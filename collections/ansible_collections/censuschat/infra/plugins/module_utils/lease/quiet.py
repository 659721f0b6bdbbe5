# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Proof by watching that a region's gates are closed: their records were not written for longer than a gate lives.

It needs no clock but the watcher's own, and no promise of the store but that its reads are not stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .model import StoreView

DRIFT = 0.2
"""How much faster the watcher's clock may run than the slowest kernel's. Quartz stays within 0.0002."""


class QuietWatch:
    """Since when the gates of the region of the newest epoch have been quiet.

    seen: what an earlier watcher on this machine noted, as node -> (revision, instant). It stays true: a record that
    still has that revision has not been written since that instant.
    """

    def __init__(self, seen: Mapping[str, tuple[int, float]] | None = None) -> None:
        self.seen = dict(seen or {})
        self.renewals = 0
        self._life: dict[str, float] = {}
        self._began = False

    def note(self, view: StoreView, answered_at: float) -> None:
        """Take in what was read; answered_at: taken after the answer came, in seconds of the watcher's clock."""
        gates = view.holders_gates()
        now: dict[str, tuple[int, float]] = {}
        for gate in gates:
            before = self.seen.get(gate.node)
            if before is not None and before[0] == gate.revision and before[1] <= answered_at:
                now[gate.node] = before
            else:
                now[gate.node] = (gate.revision, answered_at)
                self.renewals += self._began
        self.seen, self._began = now, True
        self._life = {gate.node: gate.kernel_after_s * (1 + DRIFT) for gate in gates}

    def left_s(self, now: float) -> dict[str, float]:
        """Nodes whose gates may still be open, and for how many seconds at most if they stay quiet."""
        left = {node: since + self._life[node] - now for node, (_revision, since) in self.seen.items()}
        return {node: seconds for node, seconds in left.items() if seconds > 0}

    def age_s(self, now: float) -> float:
        """Seconds since the newest writing was first seen; infinite when there is no record."""
        return min((now - since for _revision, since in self.seen.values()), default=math.inf)

    @property
    def revision(self) -> int:
        """The newest revision among the records: what a taker compares, so that no writing can come in between."""
        return max((revision for revision, _since in self.seen.values()), default=0)
