# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The judgement of what runs: units that have to be active or not, units older than their configuration, the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import PathState


@dataclasses.dataclass(frozen=True)
class Running:
    """Units of which one has to run, none may run, or one that is to be newer than its files; with the remedy."""

    remedy: str
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    unit: str = ""
    newer_than: tuple[str, ...] = ()

    @staticmethod
    def of(data: Mapping[str, Any]) -> Running:
        return Running(
            remedy=data["remedy"],
            any_of=tuple(data.get("any_of") or ()),
            none_of=tuple(data.get("none_of") or ()),
            unit=data.get("unit") or "",
            newer_than=tuple(data.get("newer_than") or ()),
        )

    @property
    def units(self) -> tuple[str, ...]:
        return (*self.any_of, *self.none_of, *((self.unit,) if self.unit else ()))


def judge(want: Running, units: Mapping[str, UnitState], paths: Mapping[str, PathState]) -> list[str]:
    """What runs otherwise than wanted, each a sentence with the remedy."""

    def state(name: str) -> UnitState:
        return units.get(name, UnitState(name))

    if want.any_of and not any(state(name).running for name in want.any_of):
        return [f"none of {', '.join(want.any_of)} runs: {want.remedy}"]
    found = [f"{name} is {state(name).active}: {want.remedy}" for name in want.none_of if state(name).running]
    if want.unit and not state(want.unit).running:
        found.append(f"{want.unit} is {state(want.unit).active}: {want.remedy}")
    elif want.unit:
        since = max(state(want.unit).active_since, state(want.unit).changed_at)
        newer = [path for path in want.newer_than if paths.get(path, PathState(path)).ctime > since]
        found += [f"{want.unit} runs since before {path} last changed: {want.remedy}" for path in newer[:1]]
    return found


def judge_clock(synchronised: bool) -> list[str]:
    """The clock as the kernel sees it."""
    if synchronised:
        return []
    return ["the kernel's clock is not synchronised: see whether the time service reaches its servers"]
