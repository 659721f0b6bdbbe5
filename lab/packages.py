"""The lab's package cache: apt-cacher-ng on the lab's own network, serving Debian's archive and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lab.images import Mirror
from lab.paths import STATE, cache
from lab.processes import Service
from lab.topology import Operator

USER = "apt-cacher-ng"


def settings(operator: Operator, mirror: Mirror) -> str:
    """apt-cacher-ng's configuration. ForceManaged: what no Remap line names is refused."""
    lines = [
        "CacheDir: /var/cache/apt-cacher-ng",
        "LogDir: /var/log/apt-cacher-ng",
        "SupportDir: /usr/lib/apt-cacher-ng",
        f"BindAddress: {operator.address}",
        f"Port: {operator.packages_port}",
        f"Remap-debian: /debian ; {mirror.archive}",
        "ForceManaged: 1",
        "ReportPage:",
        "ExThreshold: 30",
        # A node that runs apt after another gets the same index without a question to the mirror: when several ask for
        # an expired one at once, apt-cacher-ng may leave one of them without an answer for good.
        "FreshIndexMaxAge: 3600",
        "ForeGround: 1",
        "VerboseLog: 1",
    ]
    if mirror.security:
        lines.append(f"Remap-security: /debian-security ; {mirror.security}")
    if mirror.proxy:
        lines.append(f"Proxy: {mirror.proxy}")
    return "\n".join(lines) + "\n"


def service(operator: Operator, mirror: Mirror, state: Path = STATE) -> Service:
    """The cache as a process of an unprivileged user that sees its store, log and configuration at the usual places.

    The project's cache directory may lie in a home directory that this user cannot enter, hence the mounts in a
    mount namespace of its own.
    """
    store, log, configuration = cache() / "apt", state / "log" / "packages", state / "packages"
    for directory in (store, log, configuration):
        directory.mkdir(parents=True, exist_ok=True)
    for directory in (store, log):
        shutil.chown(directory, USER, USER)
    (configuration / "acng.conf").write_text(settings(operator, mirror), encoding="utf-8")
    configuration.chmod(0o755)
    script = (
        'mount --bind "$1" /var/cache/apt-cacher-ng && mount --bind "$2" /var/log/apt-cacher-ng && '
        'mount --bind "$3" /etc/apt-cacher-ng && '
        f"exec setpriv --reuid={USER} --regid={USER} --clear-groups --no-new-privs "
        "/usr/sbin/apt-cacher-ng -c /etc/apt-cacher-ng"
    )
    command = ("unshare", "--mount", "sh", "-c", script, "packages", str(store), str(log), str(configuration))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return Service("packages", command, (str(operator.address), operator.packages_port), {"PATH": path})
