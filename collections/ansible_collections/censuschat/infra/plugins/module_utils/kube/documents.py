# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Manifests to documents: YAML as kubectl reads it, files, directories, globs.

PyYAML follows YAML 1.1 to the letter: a bare `=` is an error in its safe loader, 12:30 is the number 750, a date is not
text. kubectl knows none of these, so the scalars here are resolved by its rules.
"""

from __future__ import annotations

import glob
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import InputError, Source

SUFFIXES = (".yml", ".yaml", ".json")

try:
    import yaml

    MISSING = ""
    _Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
except ImportError:
    MISSING = traceback.format_exc()
    _Base = object


class YamlProblem(ValueError):
    """Not YAML; the message has line and column, and what is wrong there."""

    def __init__(self, text: str, number: int = 1) -> None:
        super().__init__(text)
        self.number = number


class Loader(_Base):  # type: ignore[misc]
    """YAML as kubectl reads it; a key given twice in one mapping is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _value in node.value:
            text = key.value
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if isinstance(text, str):
                if text in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {text!r} is given twice", key.start_mark
                    )
                seen.add(text)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0o?[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
)
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"^<<$")


def _integer(loader: Any, node: Any) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    if digits.startswith("0b"):
        return sign * int(digits[2:], 2)
    if digits.startswith("0x"):
        return sign * int(digits[2:], 16)
    if digits.startswith("0") and digits != "0":
        return sign * int(digits.replace("o", ""), 8)
    return sign * int(digits)


if not MISSING:
    Loader.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("bool", _BOOL, "yYnNtTfFoO"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789."),
        ("null", _NULL, ["~", "n", "N", ""]),
        ("merge", _MERGE, "<"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        before = content[: error.start].lstrip().removeprefix(b"---")
        number = 1 + len(re.findall(rb"(?m)^---(?:\s|$)", before))
        raise YamlProblem(
            f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8", number
        ) from error


def load_yaml(content: bytes | str) -> list[Any]:
    """All documents of a text, empty ones as None; raises YamlProblem with the document's number."""
    text = _decoded(content) if isinstance(content, bytes) else content
    documents: list[Any] = []
    loader = Loader(text)
    try:
        while loader.check_data():
            documents.append(loader.get_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(str(p) for p in (error.context, error.problem) if p)
        raise YamlProblem(f"{where}{what}", len(documents) + 1) from error
    except yaml.YAMLError as error:
        raise YamlProblem(" ".join(str(error).split()), len(documents) + 1) from error
    except (ValueError, RecursionError) as error:
        raise YamlProblem(f"a value cannot be read: {error}", len(documents) + 1) from error
    finally:
        loader.dispose()
    return documents


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files that paths, directories (recursive; *.yml, *.yaml, *.json) and globs name, in order, each once.

    InputError names every pattern that gives nothing.
    """
    found: dict[Path, None] = {}
    problems = []
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            wrong = f"src {pattern}: the directory has no {', '.join('*' + s for s in SUFFIXES)} files"
        elif path.exists():
            files, wrong = [path], ""
        else:
            files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
            wrong = f"src {pattern}: there is no such file or directory, and nothing matches it as a pattern"
        if not files:
            problems.append(wrong)
        found.update(dict.fromkeys(files))
    if problems:
        raise InputError(problems)
    return list(found)


def read_files(paths: Iterable[Path]) -> Iterator[tuple[Source, Any] | str]:
    """Each document with its source, or what is wrong with a file. A file's other documents are still read."""
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
            continue
        yield from read_text(str(path), content)


def read_text(name: str, content: bytes | str) -> Iterator[tuple[Source, Any] | str]:
    """The documents of one text; `name` is what messages call it."""
    try:
        documents = load_yaml(content)
    except YamlProblem as problem:
        yield f"{name}, document {problem.number}: {problem}"
        return
    for number, document in enumerate(documents, 1):
        if document is not None:
            yield Source(name, number), document
