"""The values that an inventory keeps encrypted, so that none of them is written down elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runbooks.redact import SHORTEST

HEADER = b"$ANSIBLE_VAULT;"


def values(inventory: Path, loader: Any) -> frozenset[str]:
    """All texts in an inventory's vaults, whole files and single values; empty when Ansible has no vault password.

    loader: Ansible's, which has the passwords. Raises AnsibleError when one does not fit.
    """
    from ansible.parsing.vault import VaultSecretsContext

    context = VaultSecretsContext.current(optional=True)
    if context is None or not context.secrets or not inventory.exists():
        return frozenset()
    home = inventory if inventory.is_dir() else inventory.parent
    files = {inventory} if inventory.is_file() else {path for path in home.iterdir() if path.is_file()}
    files |= {path for name in ("group_vars", "host_vars") for path in (home / name).rglob("*") if path.is_file()}
    found: set[str] = set()
    for path in sorted(files):
        data = path.read_bytes()
        if HEADER in data:
            found |= set(_texts(loader.load_from_file(str(path)), whole=data.startswith(HEADER)))
    return frozenset(text for text in found if len(text) >= SHORTEST)


def _texts(value: Any, *, whole: bool) -> Iterator[str]:
    from ansible.parsing.vault import EncryptedString

    if isinstance(value, dict):
        for each in value.values():
            yield from _texts(each, whole=whole)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each, whole=whole)
    elif isinstance(value, EncryptedString) or (whole and isinstance(value, str)):
        yield str(value)
