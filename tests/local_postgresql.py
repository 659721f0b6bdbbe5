"""A real PostgreSQL of Debian's package on loopback, in a temporary directory, for as long as a test wants it.

    with LocalPostgreSQL() as server:               # about 2 s
        Journal(server.url, "unit")                 # the password comes from server.passfile (PGPASSFILE)

It keeps its promises about the disk (fsync), asks for passwords, and is ended by pid. PostgreSQL refuses to run as
root: then it runs as Debian's user postgres, otherwise as whoever runs the test.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAMS = Path("/usr/lib/postgresql")


def installed() -> Path:
    """The directory of the newest PostgreSQL's programs. Fails, and does not skip, when there is none."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    if not found:
        raise AssertionError("PostgreSQL is not installed; install it with: apt-get install postgresql")
    return found[-1].parent


class LocalPostgreSQL:
    """One server. user is a superuser of it, with a password that is nowhere but in passfile."""

    user = "keeper"
    database = "postgres"

    def __init__(self) -> None:
        self._programs = installed()
        self.version = int(self._programs.parts[-2])
        self.password = f"canary-{secrets.token_hex(8)}"
        self.directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.passfile = self.directory / "passfile"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            self._as = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            os.chown(self.directory, owner.pw_uid, owner.pw_gid)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.url_of(self.user)

    def url_of(self, user: str, port: int | None = None) -> str:
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/{self.database}"

    def __enter__(self) -> Self:
        try:
            secret = self.directory / "password"
            secret.write_text(self.password + "\n", encoding="utf-8")
            self._run("initdb", "-D", "data", "-U", self.user, "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8")
            secret.unlink()
            self.allow(self.user, self.password)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def allow(self, user: str, password: str) -> None:
        """Let clients with PGPASSFILE log in as this user, also through a proxy on another port."""
        with self.passfile.open("a", encoding="utf-8") as file:
            file.write(f"127.0.0.1:*:*:{user}:{password}\n")
        self.passfile.chmod(0o600)

    def start(self) -> None:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.directory,
            "max_connections": 120,
            "shared_buffers": "32MB",
            "log_statement": "all",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", *words],
                cwd=self.directory,
                stdout=log,
                stderr=log,
                **self._as,
            )
        deadline = time.monotonic() + 30
        while self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), check=False) != 0:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start: {self.log()[-2000:]}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT quickly and in order, SIGQUIT as if the machine had died."""
        server, self._server = self._server, None
        if server is not None and server.poll() is None:
            server.send_signal(number)
            server.wait(timeout=30)

    def log(self) -> str:
        """All that the server has written down, with every statement."""
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def sql(self, statement: str, user: str | None = None) -> list[tuple[Any, ...]]:
        """Run it with a connection of its own."""
        import psycopg

        with psycopg.connect(self.url_of(user or self.user), passfile=str(self.passfile), autocommit=True) as db:
            cursor = db.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [self._programs / program, *arguments],
            cwd=self.directory,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self._as,
        )
        if check and done.returncode:
            raise AssertionError(f"{program} failed: {done.stdout.decode(errors='replace')[-2000:]}")
        return done.returncode


class Proxy:
    """Stands between clients and a server, and cuts their connections when told to.

    cut(data): asked for everything that a client sends; when it says so, the data still reaches the server, and the
    connection ends before the answer comes back: the client cannot know whether it was done.
    """

    def __init__(self, port: int, cut: Callable[[bytes], bool]) -> None:
        self._to, self._cut = port, cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._copy, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        try:
            while data := source.recv(65536):
                if asks and self._cut(data):
                    self.cuts += 1
                    source.shutdown(socket.SHUT_RDWR)  # No answer gets back; the server still does what it was told.
                    target.sendall(data)
                    time.sleep(0.3)
                    return
                target.sendall(data)
        except OSError:
            return
        finally:
            for each in (source, target):
                each.close()
