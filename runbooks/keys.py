"""Ed25519 keys: the journal's on every machine that writes it, and each approver's own.

A private key never leaves its file (0600). A public one is written ``ed25519:BASE64``; which ones are trusted is the
inventory's to say (``runbook_journal_keys``, ``runbook_approvers``).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from runbooks.errors import Problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

JOURNAL = "journal"
JOURNAL_FILE_VARIABLE = "RUNBOOK_JOURNAL_KEY"
"""Names the journal key's PEM file where there is no home to keep it in (a container that AWX starts)."""
PREFIX = "ed25519:"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def directory() -> Path:
    """Where this person's keys are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "censuschat-infra" / "keys"


def path(name: str) -> Path:
    """The file of a key, whether it exists or not. Raises Problem when the name cannot be one."""
    if not NAME.fullmatch(name):
        raise Problem(
            f"{name!r} cannot name a key: letters, digits and . _ @ -, at most 64",
            code="key-name",
            next_command="runbook keys list",
        )
    given = os.environ.get(JOURNAL_FILE_VARIABLE) if name == JOURNAL else None
    return Path(given) if given else directory() / f"{name}.pem"


def names() -> list[str]:
    """The names of the private keys that are kept here."""
    return sorted(file.stem for file in directory().glob("*.pem"))


def create(name: str) -> Ed25519PrivateKey:
    """Make a key. Raises Problem when there is one of this name already, or its file cannot be written."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file, key = path(name), Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".")  # 0600 from its first moment
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
        # A link and not a rename: of two that make the key at once, one wins and the other is told.
        os.link(temporary, file)
    except FileExistsError:
        raise Problem(
            f"There is a key {name} already, in {file}", code="key-exists", next_command=f"ls -l {file}"
        ) from None
    except OSError as error:
        raise Problem(
            f"The key {file} cannot be written ({error.strerror})",
            code="key-unwritable",
            next_command=f"ls -ld {file.parent}",
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return key


def load(name: str) -> Ed25519PrivateKey:
    """A key of this person. Raises Problem when there is none or the file is something else."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file = path(name)
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except FileNotFoundError:
        raise Problem(
            f"There is no key {name} in {file.parent}", code="key-missing", next_command=f"runbook keys new {name}"
        ) from None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Problem(
            f"The key {file} cannot be read ({type(error).__name__})",
            code="key-unreadable",
            next_command=f"ls -l {file}",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Problem(f"The key {file} is not an Ed25519 key", code="key-kind", next_command=f"ls -l {file}")
    return key


def journal_key() -> Ed25519PrivateKey:
    """The key that this machine signs journals with, made when there is none. Raises Problem."""
    if not path(JOURNAL).exists():
        try:
            return create(JOURNAL)
        except Problem as problem:
            if problem.code != "key-exists":  # Made by another process in this very moment: it is the one to use.
                raise
    return load(JOURNAL)


def public(key: Ed25519PrivateKey) -> str:
    """The public half, as inventories hold it."""
    return PREFIX + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign(key: Ed25519PrivateKey, data: bytes) -> str:
    """The signature, in base64."""
    return base64.b64encode(key.sign(data)).decode()


def verify(public_key: str, data: bytes, signature: str) -> bool:
    """Whether the signature is this key's of this data; False as well for what is no key or no signature."""
    from cryptography.exceptions import InvalidSignature

    key, raw = _public(public_key), _bytes(signature)
    if key is None or raw is None:
        return False
    try:
        key.verify(raw, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=256)
def _public(text: str) -> Ed25519PublicKey | None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    raw = _bytes(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
    try:
        return None if raw is None else Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        return None


def valid_public(text: str) -> bool:
    """Whether this is a public key as inventories hold it."""
    return _public(text) is not None


def _bytes(text: str) -> bytes | None:
    """What the base64 text stands for; None unless it is the one way to write it (other spare bits are an edit)."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None
    return raw if base64.b64encode(raw).decode() == text else None
