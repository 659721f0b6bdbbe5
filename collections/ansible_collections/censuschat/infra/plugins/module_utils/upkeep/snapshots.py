# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The snapshot job of an etcd member: take, prove by restoring, keep, copy to another site, say how old the newest is.

A snapshot counts only after it was restored into a scratch directory and the restored data have the snapshot's
revision and keys. It holds everything the cluster knows: Secrets only as ciphertext if the API server encrypts them at
rest, and then the key is not in it and has to be backed up apart.
"""

from __future__ import annotations

import calendar
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import (
    Metric,
    UpkeepError,
    alone,
    config_of,
    free_bytes,
    must,
    publish,
    reported,
    sha256_of,
    sync_directory,
    utc_now,
    write_whole,
)
from .offsite import Target, copy_out

CONFIG = "/etc/censuschat/etcd-snapshot.json"
STAMP = "%Y%m%dT%H%M%SZ"
NAME = re.compile(r"^(?P<cluster>[a-z0-9-]+)_(?P<member>[a-z0-9.-]+)_(?P<stamp>\d{8}T\d{6}Z)\.db$")
# The snapshot, its scratch restore, and as much again for the write-ahead log that a restore preallocates (64 MB).
_ROOM = 3
_WAL_BYTES = 2 * 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """The job as the role configures it."""

    cluster: str
    member: str
    directory: Path
    keep: int
    endpoint: str
    ca_file: str
    cert_file: str
    key_file: str
    metrics: str
    targets: tuple[Target, ...]

    @staticmethod
    def of(data: Mapping[str, Any]) -> Config:
        """Read the configuration file's content."""
        return Config(
            cluster=data["cluster"],
            member=data["member"],
            directory=Path(data["directory"]),
            keep=int(data["keep"]),
            endpoint=data["endpoint"],
            ca_file=data["ca_file"],
            cert_file=data["cert_file"],
            key_file=data["key_file"],
            metrics=data["metrics"],
            targets=tuple(Target.of(target) for target in data["targets"]),
        )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What was proven of a snapshot; written beside it as NAME.json.

    revision: etcd's revision at the moment of the snapshot. hash: etcd's own hash over keys and revisions.
    """

    name: str
    cluster: str
    member: str
    taken: str
    bytes: int
    sha256: str
    revision: int
    keys: int
    hash: int
    proven: bool

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def name_of(cluster: str, member: str, stamp: str) -> str:
    """The file name of a snapshot; sorts by time within a member."""
    name = f"{cluster}_{member}_{stamp}.db"
    if not NAME.match(name):
        raise UpkeepError(
            f"{name} is no name for a snapshot: cluster and member are lower-case letters, digits, dashes"
        )
    return name


def expired(names: Sequence[str], keep: int) -> list[str]:
    """The snapshots beyond the `keep` newest of each cluster and member; names that are not ours are never touched."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = NAME.match(name)
        if match:
            groups.setdefault((match["cluster"], match["member"]), []).append(name)
    return sorted(old for group in groups.values() for old in sorted(group, reverse=True)[max(keep, 1) :])


def status(path: Path) -> tuple[int, int, int]:
    """(hash, revision, keys) of a snapshot or of a member's database, as etcdutl reads it; UpkeepError if it cannot."""
    said = must(
        ["etcdutl", "snapshot", "status", str(path), "-w", "json"], f"{path} is not a snapshot that can be read"
    )
    found = json.loads(said.out)
    return int(found["hash"]), int(found["revision"]), int(found["totalKey"])


def prove(path: Path, scratch: Path, etcd_url: str = "http://127.0.0.1:1") -> tuple[int, int, int]:
    """Restore `path` into `scratch` (made and removed here) and compare the data; (hash, revision, keys).

    etcdutl checks the checksum that etcd wrote into the snapshot; revision and number of keys then say that what a
    member would start with is what was saved. (Its hashkv cannot be asked: it panics on keys with leases, seen with
    3.6.6.) `etcd_url` is never contacted."""
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        saved = status(path)
        must(
            [
                *("etcdutl", "snapshot", "restore", str(path), "--data-dir", str(scratch), "--name", "proof"),
                *("--initial-cluster", f"proof={etcd_url}", "--initial-advertise-peer-urls", etcd_url),
            ],
            f"{path} cannot be restored, so it is no backup",
            timeout_s=600.0,
        )
        # status hashes the members' names too, which a restore replaces; revision and keys have to be the same.
        restored = status(scratch / "member/snap/db")
        if restored[1:] != saved[1:]:
            raise UpkeepError(
                f"{path} was restored to other data than it holds: revision and keys {saved[1:]}, then {restored[1:]}"
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return saved


def take(config: Config) -> Snapshot:
    """A new proven snapshot in the configured directory; nothing is left of one that could not be proven."""
    size = _database_bytes(config)
    room = _ROOM * size + _WAL_BYTES
    free = free_bytes(config.directory)
    if free < room:
        raise UpkeepError(
            f"{config.directory} has {free >> 20} MiB free and a snapshot of {size >> 20} MiB needs {room >> 20} MiB "
            "with its proof: free some, or lower kubernetes_etcd_backup_keep"
        )
    for left in config.directory.glob(".partial*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    taken = utc_now()
    name = name_of(config.cluster, config.member, taken.strftime(STAMP))
    partial = config.directory / f".partial-{name}"
    try:
        must([*_etcdctl(config), "snapshot", "save", str(partial)], "etcd gave no snapshot", timeout_s=600.0)
        partial.chmod(0o600)
        found, revision, keys = prove(partial, config.directory / ".partial-restored")
        snapshot = Snapshot(
            name=name,
            cluster=config.cluster,
            member=config.member,
            taken=taken.isoformat(),
            bytes=partial.stat().st_size,
            sha256=sha256_of(partial),
            revision=revision,
            keys=keys,
            hash=found,
            proven=True,
        )
        write_whole(config.directory / f"{name}.json", snapshot.text())
        partial.replace(config.directory / name)
        sync_directory(config.directory)
    finally:
        partial.unlink(missing_ok=True)
        Path(f"{partial}.part").unlink(missing_ok=True)
    return snapshot


def _etcdctl(config: Config) -> list[str]:
    files = ["--cacert", config.ca_file, "--cert", config.cert_file, "--key", config.key_file]
    return ["etcdctl", "--endpoints", config.endpoint, *files]


def _database_bytes(config: Config) -> int:
    said = must([*_etcdctl(config), "endpoint", "status", "-w", "json"], f"etcd does not answer at {config.endpoint}")
    return int(json.loads(said.out)[0]["Status"]["dbSize"])


def newest(directory: Path) -> Snapshot | None:
    """The newest proven snapshot in a directory; one without its description does not count."""
    for path in sorted(directory.glob("*.db"), key=lambda p: p.name.rsplit("_", 1)[-1], reverse=True):
        beside = path.with_name(f"{path.name}.json")
        if NAME.match(path.name) and beside.is_file():
            return Snapshot(**json.loads(beside.read_text(encoding="utf-8")))
    return None


def job(config: Config) -> str:
    """One run: UpkeepError unless a proven snapshot lies here and at every target. Metrics are written in any case."""
    config.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    failures: list[str] = []
    copied: dict[str, float] = _copied(config)
    snapshot: Snapshot | None = None
    with alone(config.directory / ".lock", "a snapshot job"):
        started = time.monotonic()
        try:
            snapshot = take(config)
            for target in config.targets:
                try:
                    copy_out(target, config.directory / snapshot.name, snapshot.sha256)
                    copied[target.name] = taken_at(snapshot.name)
                except UpkeepError as error:
                    failures.append(f"not copied to {target.name}: {error}")
            for old in expired([p.name for p in config.directory.glob("*.db")], config.keep):
                (config.directory / old).unlink()
                (config.directory / f"{old}.json").unlink(missing_ok=True)
        except UpkeepError as error:
            failures.append(str(error))
        write_whole(config.directory / "copied.json", json.dumps(copied, sort_keys=True))
        _publish(config, copied, bool(failures), time.monotonic() - started)
    if failures or snapshot is None:
        raise UpkeepError("; ".join(failures))
    write_whole(config.directory / "last-success", f"{snapshot.name}\n")
    places = ", ".join(target.name for target in config.targets) or "nowhere else"
    return f"{snapshot.name}: revision {snapshot.revision}, {snapshot.keys} keys, restored as proof; copied to {places}"


def taken_at(name: str) -> float:
    """When a snapshot was taken by its name, in unix seconds."""
    return float(calendar.timegm(time.strptime(name.rsplit("_", 1)[1], f"{STAMP}.db")))


def _copied(config: Config) -> dict[str, float]:
    """When the newest copy at each target was taken (unix seconds), as the runs before noted it."""
    try:
        known = json.loads((config.directory / "copied.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    return {t.name: float(known[t.name]) for t in config.targets if t.name in known}


def _publish(config: Config, copied: Mapping[str, float], failed: bool, seconds: float) -> None:
    last = newest(config.directory)
    base = {"cluster": config.cluster, "member": config.member}
    name = "censuschat_etcd_snapshot_"
    metrics = [
        Metric(
            f"{name}last_run_success", "Whether the last run of the snapshot job did all it should.", not failed, base
        ),
        Metric(f"{name}last_run_seconds", "Duration of the last run of the snapshot job.", seconds, base),
    ]
    if last:
        metrics += [
            Metric(f"{name}timestamp_seconds", "When the newest proven snapshot was taken.", taken_at(last.name), base),
            Metric(f"{name}bytes", "Size of the newest proven snapshot.", last.bytes, base),
            Metric(f"{name}keys", "Keys in the newest proven snapshot.", last.keys, base),
        ]
    for target in config.targets:
        # 0 when there never was a copy: an alert on the age fires then too.
        when = copied.get(target.name, 0.0)
        about = {**base, "target": target.name}
        metrics.append(
            Metric(f"{name}copy_timestamp_seconds", "When the newest copied snapshot was taken.", when, about)
        )
    publish(config.metrics, metrics)


def main(arguments: Sequence[str]) -> int:
    """`censuschat-etcd-snapshot`: exit code 0 when a proven snapshot lies here and at every target, else 1."""
    path = arguments[0] if arguments else CONFIG
    return reported(lambda: job(Config.of(config_of(path))), name="etcd-snapshot")
