# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Copying a snapshot to another site: over ssh to a receiver that only takes, or into a bucket.

The copy's name, size and SHA-256 are what the other side has to confirm. A target has nothing that could be run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import UpkeepError, run, sha256_of

_KINDS = ("ssh", "s3")


@dataclasses.dataclass(frozen=True)
class Target:
    """One place for copies.

    For ssh: host, port, user, key_file, known_hosts. For s3: bucket, prefix, region, endpoint_url.
    """

    name: str
    kind: str
    host: str = ""
    port: int = 22
    user: str = ""
    key_file: str = ""
    known_hosts: str = ""
    bucket: str = ""
    prefix: str = ""
    region: str = ""
    endpoint_url: str = ""

    @staticmethod
    def of(data: Mapping[str, Any]) -> Target:
        """Read a target; UpkeepError names what it lacks."""
        known = {field.name for field in dataclasses.fields(Target)}
        unknown = sorted(set(data) - known)
        if unknown or data.get("kind") not in _KINDS:
            raise UpkeepError(
                f"target {data.get('name')}: kind is one of {', '.join(_KINDS)}; unknown: {unknown or 'none'}"
            )
        target = Target(**data)
        needed = ("host", "user", "key_file", "known_hosts") if target.kind == "ssh" else ("bucket",)
        lacking = [key for key in needed if not getattr(target, key)]
        if lacking:
            raise UpkeepError(f"target {target.name} ({target.kind}) lacks {', '.join(lacking)}")
        return target


def copy_out(target: Target, path: Path, sha256: str) -> None:
    """Copy a snapshot to a target, which confirms its SHA-256; UpkeepError says why it could not."""
    if sha256_of(path) != sha256:
        raise UpkeepError(f"{path} is no longer what was proven")
    if target.kind == "ssh":
        _by_ssh(target, path, sha256)
    else:
        _by_s3(target, path, sha256)


def _by_ssh(target: Target, path: Path, sha256: str) -> None:
    options = (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "GlobalKnownHostsFile=/dev/null",
        f"UserKnownHostsFile={target.known_hosts}",
        "ConnectTimeout=10",
        "ServerAliveInterval=10",
    )
    flags = [flag for option in options for flag in ("-o", option)]
    # The receiver's account runs one program whatever is asked; this is what it is told.
    wish = shlex.join(["take", path.name, str(path.stat().st_size), sha256])
    argv = ["ssh", "-F", "/dev/null", *flags, "-p", str(target.port), "-i", target.key_file]
    done = run([*argv, f"{target.user}@{target.host}", wish], stdin_path=path, timeout_s=1800.0)
    if done.code != 0:
        raise UpkeepError(f"{target.user}@{target.host}: {done.said}")
    if f"taken {sha256}" not in done.out:
        raise UpkeepError(f"{target.user}@{target.host} did not confirm the copy: {done.said}")


def _by_s3(target: Target, path: Path, sha256: str) -> None:
    """With S3's own check of the SHA-256. A name that is taken is left: it holds the second it was made."""
    try:
        import boto3  # Debian's python3-boto3; only nodes with such a target have it.
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise UpkeepError("python3-boto3 is not installed; converge the role again") from None
    import base64

    key = f"{target.prefix.strip('/')}/{path.name}".lstrip("/")
    wanted = base64.b64encode(bytes.fromhex(sha256)).decode()
    where = f"s3://{target.bucket}/{key}"
    try:
        client = boto3.client("s3", region_name=target.region or None, endpoint_url=target.endpoint_url or None)
        held = _held(client, target.bucket, key)
        if held is None:
            with path.open("rb") as body:
                client.put_object(
                    Bucket=target.bucket,
                    Key=key,
                    Body=body,
                    ContentLength=os.path.getsize(path),
                    ChecksumSHA256=wanted,
                    ServerSideEncryption="AES256",
                    Metadata={"sha256": sha256},
                )
            held = _held(client, target.bucket, key)
    except (BotoCoreError, ClientError) as error:
        raise UpkeepError(f"{where}: {error}") from error
    if held != (os.path.getsize(path), sha256):
        raise UpkeepError(f"{where} holds something else ({json.dumps(held)}); it is left as it is")


def _held(client: Any, bucket: str, key: str) -> tuple[int, str] | None:
    """Size and SHA-256 of an object, None when there is none."""
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            return None
        raise
    return int(head["ContentLength"]), str(head.get("Metadata", {}).get("sha256", ""))
