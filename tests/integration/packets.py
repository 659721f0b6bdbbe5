"""Who connects to what, how fast the answer comes, and what of it is heard on the machine's own links."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

AT_ONCE_S = 2.0
"""Seconds in which a refusal must come; a dropped packet would take the kernel two minutes to give up on."""

# Connects from where it runs; prints what came of it and the seconds it took.
CONNECT = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
    outcome = "connected"
except OSError as error:
    outcome = type(error).__name__ if error.errno is None else str(error.errno)
print(outcome, round(time.monotonic() - began, 2))
"""
# The errors of a connection that is refused at once, whoever refuses it: no route, a rejection, a closed port.
UNREACHABLE = {"101", "113"}
REFUSED = "111"


def connect(where: str, address: object, port: int, patience: float = AT_ONCE_S) -> tuple[str, float]:
    """Connects from a namespace: "connected", an error number or an error's name, and the seconds it took."""
    program = ("ip", "netns", "exec", where, "/usr/bin/python3", "-c", CONNECT)
    command = (*program, str(address), str(port), str(patience))
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    outcome, seconds = done.stdout.split()
    return outcome, float(seconds)


@contextlib.contextmanager
def overheard(*addresses: bytes) -> Iterator[list[tuple[str, bytes]]]:
    """The IPv4 packets, coming or going, with one of the addresses, on all links of the machine: (link, packet)."""
    heard: list[tuple[str, bytes]] = []
    ended = threading.Event()
    # Only a socket for all protocols is shown what leaves.
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003)) as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)

        def listen() -> None:
            while not ended.is_set():
                if select.select([ear], [], [], 0.1)[0]:
                    packet, (link, protocol, *_) = ear.recvfrom(64)
                    if protocol == 0x0800 and (packet[12:16] in addresses or packet[16:20] in addresses):
                        heard.append((link, packet))

        ears = threading.Thread(target=listen)
        ears.start()
        try:
            yield heard
            time.sleep(0.5)
        finally:
            ended.set()
            ears.join()
