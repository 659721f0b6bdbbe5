"""The pki module: its planner as cases (data/pki/plan.yml), then real certificates in a directory."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.pki.plan import (
    AUTHORITY,
    NodeWant,
    PkiError,
    Stored,
    Want,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.pki.store import Store
from cryptography import x509

CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data/pki/plan.yml").read_text())
NOW = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
NODES = (NodeWant("a", ("a", "10.0.0.1")), NodeWant("b", ("b",)))


def want(**changes: Any) -> Want:
    values: dict[str, Any] = {
        "common_name": "lab",
        "nodes": NODES,
        "validity_days": 365,
        "ca_validity_days": 3650,
        "renew_before_days": 30,
    }
    return Want(**{**values, **changes})


def stored_of(name: str, day: datetime.date, sans: list[str], option: str = "") -> Stored:
    return Stored(
        present=True,
        common_name="lab" if name == AUTHORITY else name,
        sans=tuple(sans),
        not_after=datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC),
        pair=option != "unpaired",
        signed=option != "foreign",
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_plan(case: dict[str, Any]) -> None:
    stored = {name: stored_of(name, *values) for name, values in case["stored"].items()}
    wanted = want(common_name=case.get("common_name", "lab"))
    if "error" in case:
        with pytest.raises(PkiError, match=case["error"]):
            plan(wanted, stored, NOW)
        return
    assert [a.public() for a in plan(wanted, stored, NOW)] == case["plan"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"renew_before_days": 365}, "must be at least 0 and less than validity_days"),
        ({"ca_validity_days": 300}, "would outlive its authority"),
        ({"nodes": (NodeWant("ca", ("x",)),)}, "'ca' cannot be a node's name"),
        ({"nodes": (NodeWant("../x", ("x",)),)}, "cannot be a node's name"),
        ({"nodes": (NodeWant("x", ("x",)), NodeWant("x", ("y",)))}, "given more than once"),
        ({"nodes": (NodeWant("x", ()),)}, "has no sans"),
    ],
)
def test_senseless_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PkiError, match=message):
        want(**changes).check()


def run(store: Store, wanted: Want, now: datetime.datetime = NOW) -> list[str]:
    """One run of the module: what it issued."""
    actions = plan(wanted, store.observe([n.name for n in wanted.nodes]), now)
    store.apply(wanted, actions, now)
    return [a.name for a in actions]


def test_issues_once_and_renews_in_time(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pki"))
    assert run(store, want()) == ["ca", "a", "b"]
    assert run(store, want()) == []
    assert run(store, want(), NOW + datetime.timedelta(days=334)) == []
    assert run(store, want(), NOW + datetime.timedelta(days=336)) == ["a", "b"]
    moved = want(nodes=(NodeWant("a", ("a", "10.0.0.9")), NODES[1]))
    assert run(store, moved, NOW + datetime.timedelta(days=336)) == ["a"]


def test_a_renewed_authority_keeps_its_key(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    run(store, want(ca_validity_days=500))
    key = store.key("ca").read_bytes()
    assert run(store, want(), NOW + datetime.timedelta(days=120)) == ["ca"]
    assert store.key("ca").read_bytes() == key
    assert run(store, want(), NOW + datetime.timedelta(days=120)) == []


def test_files_are_what_tls_needs(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pki"))
    run(store, want(), datetime.datetime.now(datetime.UTC))
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "pki").glob("*.key")} == {0o600}
    server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
    accept = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    connect = ssl.create_default_context(cafile=str(store.certificate("ca")))
    accept.load_cert_chain(store.certificate("a"), store.key("a"))
    accept.load_verify_locations(store.certificate("ca"))
    accept.verify_mode = ssl.CERT_REQUIRED
    connect.load_cert_chain(store.certificate("b"), store.key("b"))
    ours = connect.wrap_bio(server, client, server_hostname="10.0.0.1")
    theirs = accept.wrap_bio(client, server, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    peer = theirs.getpeercert()
    assert peer is not None
    assert peer["subject"] == ((("commonName", "b"),),)


def test_damage_is_repaired_where_it_can_be(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    run(store, want())
    store.certificate("a").write_text("not a certificate\n")
    store.key("b").unlink()
    assert run(store, want()) == ["a", "b"]
    store.key("ca").unlink()
    with pytest.raises(PkiError, match="restore the pair from your backup"):
        run(store, want())


def test_a_certificate_of_another_authority_is_issued_again(tmp_path: Path) -> None:
    ours, other = Store(str(tmp_path / "ours")), Store(str(tmp_path / "other"))
    run(ours, want())
    run(other, want())
    for path in (other.certificate("a"), other.key("a")):
        (tmp_path / "ours" / path.name).write_bytes(path.read_bytes())
    assert run(ours, want()) == ["a"]
    certificate = x509.load_pem_x509_certificate(ours.certificate("a").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ours.certificate("ca").read_bytes()))
