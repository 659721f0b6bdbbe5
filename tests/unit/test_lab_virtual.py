"""The virtual machine of the lab: how it is reached, and what is refused before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import virtual
from lab.images import ImageError
from lab.virtual import Machine, VirtualError


def test_only_the_machines_own_key_is_taken(tmp_path: Path) -> None:
    host = Machine(tmp_path, 2222).host()
    assert (host["ansible_host"], host["ansible_port"]) == ("127.0.0.1", 2222)
    arguments = str(host["ansible_ssh_common_args"])
    assert f"UserKnownHostsFile={tmp_path}/known_hosts" in arguments
    assert f"HostKeyAlias={virtual.NAME}" in arguments
    assert "StrictHostKeyChecking" not in arguments


def test_other_processors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr("lab.virtual.platform.machine", lambda: "aarch64")
    with pytest.raises(ImageError, match="x86_64"):
        virtual.build("image:1", tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_leaves_no_image_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lab.virtual.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("lab.virtual.subprocess.run", lambda *_a, **_k: type("Done", (), {"returncode": 1})())
    for _again in range(2):
        with pytest.raises(ImageError, match="unpack the base failed"):
            virtual.build("image:1", tmp_path / "log")
    assert not [path for path in (tmp_path / "cache/machine").iterdir() if path.is_dir() and path.name[0] != "."]


def test_a_machine_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "BOOT_S", 0)
    with pytest.raises(VirtualError, match="its console"):
        Machine(tmp_path, 1).wait()
