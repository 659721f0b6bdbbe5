# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""All members of a control plane's etcd from one snapshot, in three steps that every node takes together.

check: nothing is touched; the snapshot is proven here. stop: no API server and no old member runs any more, so nothing
can be acknowledged that is about to be lost. start: each member begins from the snapshot, under one new cluster token,
with revisions far above any that a client has seen and all of them compacted: what watches from before is told to list
anew instead of being silently behind. What was on the disk is kept beside it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import static_pods
from .common import UpkeepError, free_bytes, must, run, sha256_of, sync_directory, write_whole
from .snapshots import prove
from .static_pods import APISERVER, COMPONENTS, ETCD

DATA = Path("/var/lib/etcd")
ASIDE = Path("/etc/kubernetes/etcd-restore")
# Above what any client has seen since the snapshot: at 1,000 changes a second it is passed after 11 days.
BUMP = 1_000_000_000
_WAL_BYTES = 2 * 64 * 1024 * 1024
STEPS = ("check", "stop", "start")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One restore. members: peer URLs of all members by name. sha256: of the snapshot, the same on every node."""

    name: str
    members: Mapping[str, str]
    snapshot: Path
    sha256: str
    run_id: str

    @property
    def token(self) -> str:
        """One for all members and for no other restore: members of the old cluster are refused as strangers."""
        return f"censuschat-{self.run_id}-{self.sha256[:12]}"


@dataclasses.dataclass(frozen=True)
class State:
    """How far this node is in which restore, as a crashed run left it."""

    token: str = ""
    restored: bool = False
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class Observed:
    """running: components with a process. held: those whose manifest is set aside."""

    state: State
    running: tuple[str, ...]
    held: tuple[str, ...]


def plan(step: str, wanted: Wanted, observed: Observed, *, foreseen: bool = False) -> list[str]:
    """What the step does on this node, in words; empty when it is done. UpkeepError when it must not.

    foreseen: for check mode, as if the step before had been taken.
    """
    if wanted.name not in wanted.members:
        raise UpkeepError(f"{wanted.name} is not among the members {', '.join(sorted(wanted.members))}")
    if len(wanted.members) % 2 == 0:
        raise UpkeepError(f"{len(wanted.members)} members tolerate no more failures than one less: name an odd number")
    state = observed.state
    same = state.token == wanted.token
    if state.token and not same and not state.finished:
        raise UpkeepError(
            f"an unfinished restore ({state.token}) lies in {ASIDE}: finish it with its own snapshot and id. To give "
            f"it up, move the manifests in there back to {static_pods.MANIFESTS} and delete {ASIDE}"
        )
    if same and state.finished:
        if not {ETCD, APISERVER} <= set(observed.running):
            raise UpkeepError(
                f"{wanted.name} was restored from this snapshot under the id {wanted.run_id} before, and its control "
                "plane is down again: give this restore an id of its own (-e restore_id=WORD)"
            )
        return []
    if step == "check":
        return []
    if step == "stop" and same and state.restored:
        return []
    if step == "stop":
        return [f"hold back {c}" for c in reversed(COMPONENTS) if c in observed.running or c not in observed.held]
    if not same and not foreseen:
        raise UpkeepError(f"{wanted.name} was not stopped for this restore: the step stop has to come before start")
    live = [c for c in (ETCD, APISERVER) if c in observed.running]
    if live and not state.restored and not foreseen:
        raise UpkeepError(
            f"{', '.join(live)} runs on {wanted.name}: an acknowledged write could be lost. Repeat the step stop"
        )
    steps = (
        [] if same and state.restored else [f"restore {wanted.name} from {wanted.snapshot.name}, keep what was there"]
    )
    held = [f"let {c} run" for c in COMPONENTS if c in observed.held or steps]
    return [*steps, *held, "prove that the API reads what was restored"]


# ---- looking and acting ----


def observe() -> Observed:
    """This node, with what an earlier run noted."""
    try:
        state = State(**json.loads((ASIDE / "state.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        state = State()
    return Observed(
        state=state,
        running=tuple(c for c in COMPONENTS if static_pods.find(c)),
        held=tuple(c for c in COMPONENTS if (ASIDE / f"{c}.yaml").is_file()),
    )


def check(wanted: Wanted) -> dict[str, Any]:
    """Prove the snapshot on this node; revision and keys. Nothing but a scratch directory is written."""
    if not wanted.snapshot.is_file():
        raise UpkeepError(f"{wanted.snapshot} is not on {wanted.name}")
    found = sha256_of(wanted.snapshot)
    if found != wanted.sha256:
        raise UpkeepError(f"{wanted.snapshot} on {wanted.name} has SHA-256 {found}, not {wanted.sha256}")
    needed, free = 2 * wanted.snapshot.stat().st_size + _WAL_BYTES, free_bytes(DATA)
    if free < needed:
        raise UpkeepError(f"{DATA} on {wanted.name} has {free >> 20} MiB free, and a restore needs {needed >> 20} MiB")
    if run(["systemctl", "is-active", "--quiet", "kubelet.service"]).code != 0:
        raise UpkeepError(f"the kubelet of {wanted.name} does not run: start it first, it starts the members")
    _hash, revision, keys = prove(wanted.snapshot, DATA / ".proof")
    return {"revision": revision, "keys": keys}


def _note(state: State) -> None:
    ASIDE.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(ASIDE / "state.json", json.dumps(dataclasses.asdict(state)))


def stop(wanted: Wanted, wait_s: float) -> None:
    """Hold the whole control plane of this node back."""
    _note(State(wanted.token))
    # The API server goes first: what etcd acknowledged, nobody was told by it.
    static_pods.hold_back([c for c in COMPONENTS if c != ETCD], ASIDE, wait_s)
    static_pods.hold_back([ETCD], ASIDE, wait_s)


def put_back(wanted: Wanted) -> None:
    """Replace this member's data; whatever was there is kept as `before-TOKEN`."""
    scratch, kept = DATA / f".restore-{wanted.token}", DATA / f"before-{wanted.token}"
    shutil.rmtree(scratch, ignore_errors=True)
    must(
        [
            *(
                "etcdutl",
                "snapshot",
                "restore",
                str(wanted.snapshot),
                "--data-dir",
                str(scratch),
                "--name",
                wanted.name,
            ),
            *("--initial-cluster", ",".join(f"{n}={url}" for n, url in sorted(wanted.members.items()))),
            *("--initial-advertise-peer-urls", wanted.members[wanted.name], "--initial-cluster-token", wanted.token),
            *("--bump-revision", str(BUMP), "--mark-compacted"),
        ],
        f"{wanted.name} was not restored",
        timeout_s=900.0,
    )
    kept.mkdir(mode=0o700, exist_ok=True)
    if (DATA / "member").exists() and not (kept / "member").exists():
        (DATA / "member").replace(kept / "member")
    shutil.rmtree(DATA / "member", ignore_errors=True)
    (scratch / "member").replace(DATA / "member")
    shutil.rmtree(scratch)
    sync_directory(DATA)
    _note(State(wanted.token, restored=True))


def start(wanted: Wanted, observed: Observed, wait_s: float, api_port: int) -> dict[str, Any]:
    """Restore if that is still to be done, let the parts run, and prove that the API reads what was restored."""
    if not observed.state.restored:
        put_back(wanted)
    static_pods.let_run([ETCD], ASIDE)
    if not static_pods.wait_for(
        lambda: static_pods.healthy(["https://127.0.0.1:2379"])["https://127.0.0.1:2379"], wait_s
    ):
        raise UpkeepError(
            f"etcd of {wanted.name} was restored and does not serve after {wait_s:.0f} s: look at "
            "/var/log/pods/kube-system_etcd-*; a second run with the same id goes on from here"
        )
    static_pods.let_run(COMPONENTS, ASIDE)
    static_pods.wait_api(wanted.name, wait_s, api_port)
    read = prove_readable(f"https://127.0.0.1:{api_port}")
    _note(State(wanted.token, restored=True, finished=True))
    return read


def prove_readable(server: str) -> dict[str, Any]:
    """Read namespaces, and all Secrets: they show that the keys of the encryption at rest fit the snapshot."""
    kubectl = ["kubectl", "--kubeconfig", "/etc/kubernetes/admin.conf", "--server", server, "--request-timeout=60s"]
    counts = {}
    for kind in ("namespaces", "secrets"):
        done = run([*kubectl, "get", kind, "--all-namespaces", "--chunk-size=500", "-o", "name"], timeout_s=180.0)
        if done.code != 0:
            hint = ""
            if kind == "secrets":
                hint = ". If they do not decrypt, /etc/kubernetes/access/encryption.yaml has not the snapshot's keys"
            raise UpkeepError(f"the API is back but its {kind} cannot be read: {done.said}{hint}")
        counts[kind] = len(done.out.split())
    return counts
