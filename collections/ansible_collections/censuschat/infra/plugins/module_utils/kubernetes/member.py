# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of kubernetes_member: pure. What a node needs next to be, or no longer be, a member of its cluster."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError


class Step(enum.Enum):
    """What to do next with the node."""

    NOTHING = "nothing"
    START = "start"
    """Start the kubelet of a member."""
    RESTART = "restart"
    """Restart the kubelet, so that it registers its node again."""
    ENTER = "enter"
    """Be the first control plane, or join: decided in the node's turn."""
    FOUND = "found"
    """Make a new cluster with this node as its first control plane."""
    JOIN = "join"
    REJOIN = "rejoin"
    """Clear away what an interrupted join left, then join."""
    RECONFIGURE = "reconfigure"
    """Have the control plane's components run with the configuration that is wanted now."""
    RESET = "reset"
    """Leave the cluster and clear away what belongs to it."""


#: Steps that wait for the node's turn, and for what a join needs.
IN_TURN = frozenset({Step.ENTER, Step.FOUND, Step.JOIN, Step.REJOIN, Step.RECONFIGURE})


class Seen(enum.Enum):
    """What the API server says of the node, asked with the node's own certificate."""

    NOT_ASKED = "not asked"
    REGISTERED = "registered"
    UNKNOWN = "unknown"
    SILENT = "silent"
    """No answer."""
    STRANGER = "stranger"
    """The API server does not know the certificate's authority, or the other way round."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """The node as it is.

    joined: it has a kubelet's credentials. control_plane: it has an API server's manifest. pending: `found` or `join`
    when kubeadm was interrupted in it. active: the kubelet runs. configuration: hash that the API server's manifest
    carries. version: of the API server's image, without v. remains: what is left of an earlier membership. data: where
    etcd's data of one is. members: names of the etcd members, with whether each serves; empty when not asked.
    """

    joined: bool = False
    control_plane: bool = False
    pending: str = ""
    active: bool = False
    configuration: str = ""
    version: str = ""
    remains: tuple[str, ...] = ()
    data: str = ""
    seen: Seen = Seen.NOT_ASKED
    why: str = ""
    members: Mapping[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the node shall be. `configuration` is the hash of a control plane's configuration, `endpoint` the API's."""

    name: str
    present: bool = True
    control_plane: bool = False
    configuration: str = ""
    version: str = ""
    endpoint: str = ""


@dataclasses.dataclass(frozen=True)
class Peers:
    """What is known of the cluster's control planes when a node is to enter it.

    members: those that have a cluster; bare: those that have none; unseen: those that nobody asked.
    first: the one that founds the cluster. kubeconfig: the operator's, when there is one.
    """

    members: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    first: str = ""
    kubeconfig: str = ""


def plan(wanted: Wanted, observed: Observed, peers: Peers | None = None) -> tuple[Step, str]:
    """The next step and why; NodeError when none is safe. `peers` is given in the node's turn."""
    if not wanted.present:
        return _leave(wanted, observed)
    if observed.joined and observed.seen is Seen.STRANGER:
        raise NodeError(
            f"{wanted.name} is a member of another cluster than the one at {wanted.endpoint} ({observed.why}): "
            "remove it from that one first (playbook cluster_remove.yml), then run again"
        )
    if observed.joined and observed.control_plane is not wanted.control_plane:
        now, then = ("control plane", "worker") if observed.control_plane else ("worker", "control plane")
        raise NodeError(
            f"{wanted.name} is a {now} but the inventory wants a {then}: remove the node from the cluster first "
            "(playbook cluster_remove.yml), then run again"
        )
    if observed.pending == "found":
        return _enter(wanted, observed, peers, "the first start of the cluster was interrupted")
    if observed.pending == "join" and observed.seen is not Seen.REGISTERED:
        return Step.REJOIN, "an earlier join was interrupted"
    if not observed.joined:
        if observed.data:
            return _with_data(wanted, observed, peers)
        if observed.remains:
            return Step.REJOIN, f"remains of an earlier membership: {', '.join(observed.remains)}"
        if not wanted.control_plane:
            return Step.JOIN, "it is no member"
        return _enter(wanted, observed, peers, "it is no member")
    if not observed.active:
        return Step.START, "the kubelet does not run"
    if observed.seen is Seen.SILENT:
        raise NodeError(
            f"the API at {wanted.endpoint} does not answer {wanted.name}: {observed.why}. Look at the control planes: "
            "`journalctl -u kubelet` and `ctr -n k8s.io containers list` there"
        )
    if observed.seen is Seen.UNKNOWN:
        return Step.RESTART, "the cluster does not know the node any more"
    if wanted.control_plane:
        if observed.version and wanted.version and observed.version != wanted.version:
            raise NodeError(
                f"the control plane of {wanted.name} runs Kubernetes {observed.version} and the inventory says "
                f"{wanted.version}: that is an upgrade, which this role does not do in passing. Upgrade the cluster "
                "first, or set the version back"
            )
        if wanted.configuration and observed.configuration != wanted.configuration:
            return Step.RECONFIGURE, "its configuration changed"
    return Step.NOTHING, ""


def _with_data(wanted: Wanted, observed: Observed, peers: Peers | None) -> tuple[Step, str]:
    """A node without membership but with etcd's data gives them up only when its cluster lives elsewhere."""
    why = f"it is no member any more but has etcd's data in {observed.data}"
    if wanted.control_plane and peers is None:
        return Step.ENTER, why
    if wanted.control_plane and peers and [name for name in peers.members if name != wanted.name]:
        return Step.REJOIN, why
    raise NodeError(
        f"{wanted.name} is no member of a cluster but has etcd's data in {observed.data}, which may be the last copy "
        "of one: nothing was touched. Restore the cluster from it or from a snapshot, or move it away, then run again"
    )


def _enter(wanted: Wanted, observed: Observed, peers: Peers | None, why: str) -> tuple[Step, str]:
    """Found the cluster or join it; never found a second one."""
    if peers is None:
        return Step.ENTER, why
    others = [name for name in peers.members if name != wanted.name]
    if others:
        if observed.pending == "found":
            return Step.REJOIN, f"{why}, and {', '.join(others)} founded it since"
        return Step.JOIN, f"{why}; {', '.join(others)} {'are' if len(others) > 1 else 'is'}"
    if peers.unseen:
        raise NodeError(
            f"{wanted.name} cannot know whether its cluster exists: {', '.join(peers.unseen)} did not take part in "
            "this run. Run it for all control planes of the cluster"
        )
    # A kubeconfig is written after founding, so an interrupted founding goes on with or without it.
    if peers.kubeconfig and observed.pending != "found":
        raise NodeError(
            f"the cluster was founded before (there is {peers.kubeconfig}), but none of its control planes "
            f"({', '.join(peers.bare)}) has it any more: restore it from an etcd snapshot. To found a new and empty "
            "cluster instead, remove that file and run again"
        )
    if wanted.name != peers.first:
        raise NodeError(f"{peers.first} did not found the cluster, so {wanted.name} cannot join it: see its message")
    return Step.FOUND, f"{why}, and so is no other control plane"


def _leave(wanted: Wanted, observed: Observed) -> tuple[Step, str]:
    if not (observed.joined or observed.pending or observed.remains or observed.data):
        return Step.NOTHING, ""
    if not observed.joined and observed.data and not observed.pending:
        raise NodeError(
            f"{wanted.name} is no member of a cluster but has etcd's data in {observed.data}, which may be the last "
            "copy of one: nothing was touched. Move it away, then run again"
        )
    if not observed.control_plane or observed.pending == "join":
        return Step.RESET, "it is a member" if observed.joined else "remains of an earlier membership"
    if refusal := may_leave(wanted.name, observed.members):
        raise NodeError(refusal)
    return Step.RESET, "it is a control plane"


def may_leave(name: str, members: Mapping[str, bool]) -> str:
    """Why the control plane `name` may not be removed now; empty when it may.

    The remaining etcd members need a majority of themselves, and etcd needs one of all to agree to the removal.
    """
    others = [m for m in members if m != name]
    serving = [m for m in others if members[m]]
    if not others:
        return (
            f"{name} is the last control plane of its cluster and is not removed: all objects would be lost with it. "
            "To end the cluster, remove its workers and then the machine itself"
        )
    if len(serving) < len(others) // 2 + 1:
        silent = ", ".join(sorted(set(others) - set(serving)))
        return (
            f"{name} is not removed: etcd would lose its majority, as {silent} of the {len(others)} other members "
            f"{'does' if len(others) - len(serving) == 1 else 'do'} not serve. Repair or replace that first"
        )
    return ""
