# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads a user's data into typed values and keeps every problem found, each with the place it is in."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
_CPU = re.compile(r"^(\d+)m$|^(\d+(?:\.\d{1,3})?)$")
_MEMORY = re.compile(r"^(\d+)(Ki|Mi|Gi|Ti|k|M|G|T)?$")
_FACTOR = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTOR |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class PlatformError(Exception):
    """The description cannot be turned into objects; the text names every problem and its place."""


def cpu(text: str) -> int:
    """Millicores of a Kubernetes CPU quantity such as ``500m``, ``2`` or ``0.5``."""
    match = _CPU.match(text)
    if not match:
        raise ValueError(f"{text!r} is not an amount of CPU such as 500m or 2")
    return int(match[1]) if match[1] else round(float(match[2]) * 1000)


def memory(text: str) -> int:
    """Bytes of a Kubernetes memory quantity such as ``512Mi`` or ``2Gi``."""
    match = _MEMORY.match(text)
    if not match:
        raise ValueError(f"{text!r} is not an amount of memory such as 512Mi or 2Gi")
    return int(match[1]) * _FACTOR[match[2] or ""]


def cpu_text(millicores: int) -> str:
    """The quantity as the API server writes it."""
    return f"{millicores}m" if millicores % 1000 else str(millicores // 1000)


def memory_text(amount: int) -> str:
    """The quantity in the largest binary unit that holds it exactly."""
    for unit in ("Gi", "Mi", "Ki"):
        if amount and amount % _FACTOR[unit] == 0:
            return f"{amount // _FACTOR[unit]}{unit}"
    return str(amount)


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings key by key, anything else replaced, a key whose value is null taken away."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    merged = {key: value for key, value in base.items() if key not in over or over[key] is not None}
    for key, value in over.items():
        if value is not None:
            merged[key] = merge(base.get(key), value) if key in base else value
    return merged


class Problems:
    """What is wrong with a description, in the order in which it was found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        text = f"{where}: {what}"
        if text not in self.found:
            self.found.append(text)

    def settle(self) -> None:
        """Raises PlatformError when there are any."""
        if self.found:
            count = f"{len(self.found)} problems" if len(self.found) > 1 else "1 problem"
            raise PlatformError(f"the platform's description has {count}. " + " | ".join(self.found))


class Reader:
    """One mapping of a description. Each method takes one key; a wrong value is a problem, and the fallback goes on.

    Leaving the ``with`` block reports the keys that nobody took.
    """

    def __init__(self, problems: Problems, where: str, data: Any) -> None:
        self.problems, self.where = problems, where
        self._data: dict[str, Any] = {}
        self._known: list[str] = []
        if isinstance(data, Mapping):
            self._data = {str(key): value for key, value in data.items()}
        elif data is not None:
            self.problem("", f"must be a mapping, not {type(data).__name__}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for key in self._data:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self._known)}"
                self.problem("", f"unknown key {key}; {hint}")

    def problem(self, key: str, what: str) -> None:
        self.problems.add(f"{self.where}.{key}" if key else self.where, what)

    def has(self, key: str) -> bool:
        return self.raw(key) is not None

    def raw(self, key: str) -> Any:
        if key not in self._known:
            self._known.append(key)
        return self._data.get(key)

    def text(self, key: str, default: str = "", *, required: bool = False, one_of: Sequence[str] = ()) -> str:
        value = self.raw(key)
        if value is None or value == "":
            if required:
                self.problem(key, "is missing")
            return default
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            self.problem(key, f"must be a text, not {type(value).__name__}")
            return default
        if one_of and value not in one_of:
            self.problem(key, f"is {value!r}; it must be one of {', '.join(one_of)}")
            return default
        return str(value)

    def name(self, key: str, default: str = "", *, required: bool = False) -> str:
        value = self.text(key, default, required=required)
        if value and not _NAME.match(value):
            self.problem(key, f"{value!r} is not a name Kubernetes accepts (lower-case letters, digits and hyphens)")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, f"must be true or false, not {value!r}")
            return default
        return value

    def number(self, key: str, default: int | None = None, low: int = 0, high: int = 2**31 - 1) -> int:
        """A whole number; required where no default is given."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, "is missing" if value is None else f"must be a whole number, not {value!r}")
            return default or low
        if not low <= value <= high:
            self.problem(key, f"is {value}; it must be from {low} to {high}")
            return default or low
        return value

    def amount(self, key: str, convert: Callable[[str], int], default: int | None = None) -> int:
        """A CPU or memory quantity; required where no default is given."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.problem(key, "is missing")
            return 0
        try:
            return convert(str(value))
        except ValueError as error:
            self.problem(key, str(error))
            return 0

    def texts(self, key: str, default: Iterable[str] = ()) -> tuple[str, ...]:
        value = self.raw(key)
        if value is None:
            return tuple(default)
        if not isinstance(value, Sequence) or isinstance(value, str):
            self.problem(key, f"must be a list, not {type(value).__name__}")
            return tuple(default)
        return tuple(str(item) for item in value)

    def names(self, key: str, default: Iterable[str] = ()) -> tuple[str, ...]:
        found = self.texts(key, default)
        for value in found:
            if not _NAME.match(value):
                self.problem(key, f"{value!r} is not a name Kubernetes accepts")
        for value in sorted({value for value in found if found.count(value) > 1}):
            self.problem(key, f"names {value} twice")
        return found

    def blocks(self, key: str) -> tuple[str, ...]:
        """A list of address blocks."""
        found = self.texts(key)
        for value in found:
            try:
                ipaddress.ip_network(value)
            except ValueError as error:
                self.problem(key, f"{value!r} is not an address block: {error}")
        return found

    def reader(self, key: str) -> Reader:
        """The mapping under the key, empty when it is absent."""
        return Reader(self.problems, f"{self.where}.{key}", self.raw(key))

    def items(self, key: str) -> Iterator[Reader]:
        """The mappings of the list under the key."""
        value = self.raw(key)
        if value is None:
            return
        if not isinstance(value, Sequence) or isinstance(value, str):
            self.problem(key, f"must be a list, not {type(value).__name__}")
            return
        for index, item in enumerate(value):
            yield Reader(self.problems, f"{self.where}.{key}[{index}]", {} if item is None else item)

    def entries(self, key: str) -> Iterator[tuple[str, Reader]]:
        """Name and mapping of each entry of the mapping under the key; the names must be ones Kubernetes accepts."""
        value = self.raw(key)
        if value is None:
            return
        if not isinstance(value, Mapping):
            self.problem(key, f"must be a mapping by name, not {type(value).__name__}")
            return
        for name, item in value.items():
            if not _NAME.match(str(name)):
                self.problem(key, f"{name!r} is not a name Kubernetes accepts")
                continue
            yield str(name), Reader(self.problems, f"{self.where}.{key}.{name}", {} if item is None else item)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problem(key, f"must be a mapping, not {type(value).__name__}")
            return {}
        return {str(name): item for name, item in value.items()}
