# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The directory of an authority: reading what lies there, issuing what the plan says.

Files: ca.crt, ca.key, NODE.crt, NODE.key. The directory is 0700 and keys are 0600, of the user who runs it.
ECDSA P-256 throughout: handshakes cost little, which counts where health checks make several a second.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from ansible_collections.censuschat.infra.plugins.module_utils.pki.plan import (
    AUTHORITY,
    Action,
    PkiError,
    Stored,
    Want,
)

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    MISSING = ""
    UNREADABLE: tuple[type[Exception], ...] = (ValueError, TypeError, UnsupportedAlgorithm)
except ImportError:
    MISSING = traceback.format_exc()

# Issued with a start in the past, so that a node whose clock is a little behind accepts them.
_BACKDATE = datetime.timedelta(hours=1)


class Store:
    """One directory with one authority."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def certificate(self, name: str) -> Path:
        return self.directory / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    # ---- observe ----

    def observe(self, names: Sequence[str]) -> dict[str, Stored]:
        """What lies there for the authority and `names`; empty when the directory has no authority yet."""
        if not self.certificate(AUTHORITY).exists() and not self.key(AUTHORITY).exists():
            return {}
        loaded = self._load(AUTHORITY)
        if loaded is None:
            raise PkiError(
                f"{self.certificate(AUTHORITY)} and {self.key(AUTHORITY)} are not both a readable certificate and key: "
                "restore the pair from your backup, or move both away to found a new authority"
            )
        authority, authority_key = loaded
        stored = {AUTHORITY: _stored(authority, authority_key, authority)}
        for name in names:
            pair = self._load(name)
            if pair is not None:
                stored[name] = _stored(*pair, authority)
        return stored

    def _load(self, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate(name).read_bytes())
            key = serialization.load_pem_private_key(self.key(name).read_bytes(), password=None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PkiError(f"{error.filename} cannot be read: {error.strerror}") from error
        except UNREADABLE:
            return None
        return (certificate, key) if isinstance(key, ec.EllipticCurvePrivateKey) else None

    # ---- apply ----

    def apply(self, want: Want, actions: Sequence[Action], now: datetime.datetime) -> None:
        """Issue what the plan says. Each pair is written whole; an interrupted run is finished by the next."""
        if not actions:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for action in actions:
                if action.name == AUTHORITY:
                    self._found(want, action, now)
                else:
                    self._issue(want, action, now)
        except OSError as error:
            raise PkiError(f"{error.filename or self.directory} cannot be written: {error.strerror}") from error

    def _found(self, want: Want, action: Action, now: datetime.datetime) -> None:
        key = None
        if action.keep_key:
            loaded = self._load(AUTHORITY)
            key = loaded[1] if loaded else None
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = _name(want.common_name)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + datetime.timedelta(days=want.ca_validity_days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        self._write(AUTHORITY, certificate, key)

    def _issue(self, want: Want, action: Action, now: datetime.datetime) -> None:
        loaded = self._load(AUTHORITY)
        if loaded is None:
            raise PkiError(f"{self.certificate(AUTHORITY)} vanished while certificates were being issued")
        authority, authority_key = loaded
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(action.name))
            .issuer_name(authority.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + datetime.timedelta(days=want.validity_days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([_general(s) for s in action.sans]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        self._write(action.name, certificate, key)

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        # The key first: a certificate without its key is issued again, never used.
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _replace(self.key(name), secret, 0o600)
        _replace(self.certificate(name), certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _stored(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, authority: x509.Certificate) -> Stored:
    names = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return Stored(
        present=True,
        common_name=names[0] if names else "",
        sans=tuple(_sans(certificate)),
        not_after=certificate.not_valid_after_utc,
        pair=certificate.public_key() == key.public_key(),
        signed=_signed(certificate, authority),
    )


def _sans(certificate: x509.Certificate) -> Iterator[str]:
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        yield from names.get_values_for_type(x509.DNSName)
        yield from (str(address) for address in names.get_values_for_type(x509.IPAddress))


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(san: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(san))
    except ValueError:
        return x509.DNSName(san)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _replace(path: Path, content: bytes, mode: int) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
