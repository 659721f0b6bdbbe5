"""A client's view of names: a stub resolver that asks the lab's DNS and keeps an answer exactly as long as its TTL."""

from __future__ import annotations

import time

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype

from lab.dns import ADDRESS, PORT


class UnresolvedError(Exception):
    """A name could not be resolved; says which and what the server answered."""


class Names:
    """Resolves names to IPv4 addresses. Ages by the monotonic clock: dnspython's own cache uses the wall clock, and a
    clock that is set must not make a client follow a record sooner or later."""

    def __init__(self, address: str = ADDRESS, port: int = PORT, timeout_s: float = 1.0) -> None:
        self._server, self._port, self._timeout_s = address, port, timeout_s
        self._cache: dict[str, tuple[float, list[str]]] = {}

    def addresses(self, name: str) -> list[str]:
        """The record's addresses in the order served; an answer whose TTL has run out is never used again.

        Raises UnresolvedError when there is no usable answer.
        """
        asked = time.monotonic()
        known = self._cache.get(name)
        if known is not None and asked < known[0]:
            return known[1]
        try:
            question = dns.message.make_query(name, dns.rdatatype.A)
            reply, _ = dns.query.udp_with_fallback(
                question, self._server, port=self._port, timeout=self._timeout_s, ignore_unexpected=True
            )
        except (OSError, dns.exception.DNSException) as error:
            raise UnresolvedError(f"{name}: no answer from {self._server}:{self._port}: {error}") from error
        if reply.rcode() != dns.rcode.NOERROR:
            raise UnresolvedError(f"{name}: {dns.rcode.to_text(reply.rcode())}")
        found = [
            (item.to_text(), rrset.ttl) for rrset in reply.answer if rrset.rdtype == dns.rdatatype.A for item in rrset
        ]
        if not found:
            raise UnresolvedError(f"{name}: has no address")
        ttl = min(rrset.ttl for rrset in reply.answer)
        addresses = [address for address, _ in found]
        self._cache[name] = (asked + ttl, addresses)
        return addresses
