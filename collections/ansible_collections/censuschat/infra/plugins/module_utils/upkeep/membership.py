# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""A control plane's place in its etcd cluster: guarded against starting empty, taken anew after its disk was lost.

kubeadm's first control plane keeps `--initial-cluster-state=new` in its manifest. A member of it whose disk was emptied
would found an empty cluster of its own, and the API server beside it would serve that. With `existing` it stays down
until somebody decides; the decision is here, and refuses wherever data could be lost by it.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from . import static_pods
from .common import UpkeepError, must, run, write_whole
from .static_pods import APISERVER, ETCD, MANIFESTS, Member, etcdctl

DATA = Path("/var/lib/etcd")
ASIDE = Path("/etc/kubernetes/etcd-rejoin")
LOCAL = "https://127.0.0.1:2379"
_FLAG = re.compile(r"^(?P<indent>\s*- )--(?P<name>[a-z-]+)=(?P<value>.*)$", re.MULTILINE)


class Step(enum.Enum):
    """What to do with this node's member."""

    NOTHING = "nothing"
    GUARD = "guard"
    """Write `existing` into its manifest; the kubelet restarts it."""
    REJOIN = "rejoin"
    """Remove its lost place, if the cluster still knows it, and take a new one with an empty disk."""
    START = "start"
    """It has a place and nothing on its disk yet: an interrupted rejoin goes on."""
    FINISH = "finish"
    """It serves; an interrupted run left its API server held back."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """This node's member and the cluster around it.

    serves: it answers a read that needs the quorum. empty: it holds no keys. guarded: its manifest says `existing`.
    known: the members as the others list them, None when these have no quorum. serving: names of those that serve.
    """

    manifest: bool
    serves: bool
    guarded: bool
    empty: bool
    known: tuple[Member, ...] | None
    serving: frozenset[str]
    held: bool = False
    """An interrupted run set its manifest, or its API server's, aside."""


def plan(name: str, peer_url: str, observed: Observed, *, discard: bool = False) -> tuple[Step, str]:
    """The next step and why; UpkeepError when none would be right. discard: what is on its disk may go."""
    if not observed.manifest:
        raise UpkeepError(
            f"{name} has no {MANIFESTS}/etcd.yaml, so it is no control plane: join it with playbooks/cluster.yml"
        )
    if observed.serves:
        if observed.guarded:
            return (Step.FINISH, "an interrupted run held its API server back") if observed.held else (Step.NOTHING, "")
        ill = sorted(m.name for m in observed.known or () if m.name != name and m.name not in observed.serving)
        if ill:
            raise UpkeepError(f"{name} is not restarted while {', '.join(ill)} does not serve: repair it first")
        return Step.GUARD, "its manifest would let an emptied disk found a new cluster"
    if observed.held and not observed.empty:
        return Step.GUARD, "an interrupted run held it back"
    if observed.known is None:
        raise UpkeepError(
            f"{name} does not serve and neither do enough others for a quorum: start the others, or restore all of "
            "them from a snapshot with playbooks/restore-etcd.yml"
        )
    mine = [m for m in observed.known if m.name == name or peer_url in m.peer_urls]
    others = [m for m in observed.known if m not in mine]
    if len([m for m in others if m.name in observed.serving]) <= len(observed.known) // 2:
        raise UpkeepError(
            f"{name} does not serve, and of the others only {', '.join(sorted(observed.serving)) or 'none'} does: "
            "removing a member now could cost the quorum. Repair the others first"
        )
    if mine and not mine[0].name and observed.empty:
        return Step.START, "it has a new place and did not take it yet"
    if observed.empty:
        return Step.REJOIN, "its disk holds no keys" + ("" if mine else " and the cluster does not know it")
    if discard:
        return Step.REJOIN, "what is on its disk is given up, as asked"
    raise UpkeepError(
        f"{name} does not serve but its disk holds data: look at /var/log/pods/kube-system_etcd-* there. If the data "
        "cannot be saved, run again with discard_data: true and it takes a fresh copy from the others"
    )


def plan_removal(name: str, known: tuple[Member, ...], serving: frozenset[str]) -> Member | None:
    """The member to remove, None when it is gone; UpkeepError when that could cost the quorum or it is alive."""
    mine = [m for m in known if m.name == name]
    if not mine:
        return None
    if name in serving:
        raise UpkeepError(f"{name} serves, and a living member is not removed: take its node out with kubeadm reset")
    rest = [m for m in known if m not in mine]
    alive = [m for m in rest if m.name in serving]
    if len(alive) <= len(rest) // 2:
        raise UpkeepError(
            f"without {name} the cluster has {len(rest)} members of which {len(alive)} serve, which is no quorum: "
            "repair another member first, or restore from a snapshot with playbooks/restore-etcd.yml"
        )
    return mine[0]


def flags_of(manifest: str) -> dict[str, str]:
    """The `--name=value` arguments of a static pod's manifest."""
    return {match["name"]: match["value"] for match in _FLAG.finditer(manifest)}


def with_flags(manifest: str, values: Mapping[str, str]) -> str:
    """The manifest's text with these arguments; those that are not there come after the first that is."""
    missing = dict(values)

    def replace(match: re.Match[str]) -> str:
        value = missing.pop(match["name"], match["value"])
        return f"{match['indent']}--{match['name']}={value}"

    text = _FLAG.sub(replace, manifest)
    first = _FLAG.search(text)
    if missing and first is None:
        raise UpkeepError("etcd's manifest has no --flag=value arguments: it is not kubeadm's")
    if first is not None:
        added = "".join(f"\n{first['indent']}--{name}={value}" for name, value in missing.items())
        text = text[: first.end()] + added + text[first.end() :]
    return text


# ---- looking and acting ----


def observe(name: str, others: Mapping[str, str]) -> Observed:
    """others: client URLs of the other control planes' members by name."""
    path = next((d / "etcd.yaml" for d in (MANIFESTS, ASIDE) if (d / "etcd.yaml").is_file()), None)
    manifest = path.read_text(encoding="utf-8") if path else ""
    held = any(ASIDE.glob("*.yaml"))
    serves = bool(manifest) and static_pods.healthy([LOCAL])[LOCAL]
    guarded = flags_of(manifest).get("initial-cluster-state") == "existing"
    if serves and guarded:
        # As on every run but the first: nobody else has to be asked.
        return Observed(True, serves, guarded, False, None, frozenset([name]), held)
    # Asked through the others when this one does not serve: it may be alone in a cluster of its own.
    known = _known([LOCAL] if serves else list(others.values()))
    urls = {m.name: m.client_urls[0] for m in known or () if m.name and m.client_urls and m.name != name}
    well = static_pods.healthy(list(urls.values()))
    return Observed(
        manifest=bool(manifest),
        serves=serves,
        guarded=guarded,
        empty=not serves and is_empty(DATA),
        known=known,
        serving=frozenset(n for n, url in urls.items() if well[url]) | (frozenset([name]) if serves else frozenset()),
        held=held,
    )


def _known(endpoints: list[str]) -> tuple[Member, ...] | None:
    try:
        return tuple(static_pods.members(",".join(endpoints))) if endpoints else None
    except UpkeepError:
        return None


def is_empty(data: Path) -> bool:
    """Whether the data directory holds no keys. A member that started on an emptied disk leaves files, but no keys.

    Asks the database, which etcd writes every 100 ms (its batch interval): a member whose first keys ever are younger
    than that when it is killed has them in its log only. No cluster of Kubernetes is that young.
    """
    database = data / "member/snap/db"
    if not database.exists():
        return True
    done = run(["etcdutl", "snapshot", "status", str(database), "-w", "json"], timeout_s=20.0)
    if done.code != 0:
        # Held open by a member that just tries to start, or damaged: not known to be empty.
        return False
    return int(json.loads(done.out)["totalKey"]) == 0


def apply(
    step: Step, name: str, peer_url: str, observed: Observed, *, wait_s: float, others: Mapping[str, str]
) -> None:
    """Carry out the step and wait until the member serves."""
    if step is Step.NOTHING:
        return
    if step is Step.FINISH:
        static_pods.let_run([APISERVER], ASIDE)
        static_pods.wait_api(name, wait_s)
        return
    old = static_pods.find(ETCD)
    # The API server goes before its etcd and comes after it. Alone it hangs, and so does the kubelet that happens to be
    # connected to it: it waited 20 to 34 s for an answer about etcd's old pod before it started the new one.
    parts = [APISERVER, ETCD]
    static_pods.hold_back(parts, ASIDE, wait_s)
    path = ASIDE / "etcd.yaml"
    values = {"initial-cluster-state": "existing"}
    if step in (Step.REJOIN, Step.START):
        endpoints = ",".join(others.values())
        if step is Step.REJOIN:
            for member in observed.known or ():
                if member.name == name or peer_url in member.peer_urls:
                    words = etcdctl("member", "remove", f"{member.id:x}", endpoints=endpoints)
                    must(words, f"the lost place of {name} was not removed")
            must(
                etcdctl("member", "add", name, f"--peer-urls={peer_url}", endpoints=endpoints), "no new place was given"
            )
        shutil.rmtree(DATA / "member", ignore_errors=True)
        known = static_pods.members(endpoints)
        places = {(m.name or name): m.peer_urls[0] for m in known}
        values["initial-cluster"] = ",".join(f"{n}={url}" for n, url in sorted(places.items()))
    write_whole(path, with_flags(path.read_text(encoding="utf-8"), values))
    static_pods.let_run([ETCD], ASIDE)

    def serves() -> bool:
        process = static_pods.find(ETCD)
        return process is not None and process != old and static_pods.healthy([LOCAL])[LOCAL]

    if not static_pods.wait_for(serves, wait_s):
        raise UpkeepError(
            f"{name} does not serve {wait_s:.0f} s after `{step.value}`: look at /var/log/pods/kube-system_etcd-*. "
            "A second run goes on from here"
        )
    static_pods.let_run(parts, ASIDE)
    static_pods.wait_api(name, wait_s)


def remove(member: Member) -> None:
    """Remove a dead member, asked at this node's own."""
    must(etcdctl("member", "remove", f"{member.id:x}"), f"{member.name} was not removed")
