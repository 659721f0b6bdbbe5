# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of the firewall: read files and loaded tables, load a table, and keep it for the next boot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node import plan_firewall
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_firewall import (
    MAIN,
    SERVICE,
    SERVICE_DROP_IN,
    Firewall,
    FirewallSeen,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    observe_path,
    write_atomically,
)

# The form in which the kernel shows a table of ours right after it was loaded.
KEPT = "/var/lib/censuschat-hardening/firewall"


def loaded(tables: Sequence[str], commands: Commands) -> dict[str, str]:
    """Each table's comparable form, "" when it is not loaded; one process asks for all."""
    if shutil.which("nft", path="/usr/sbin:/sbin") is None:
        return dict.fromkeys(tables, "")
    done = commands.run(["/usr/sbin/nft", "-j", "list", "ruleset", "inet"])
    if done.code != 0:
        raise NodeError(f"the loaded firewall cannot be read: {done.tail(2)}")
    items = json.loads(done.out)["nftables"]
    forms = {}
    for table in tables:
        mine = [i for i in items if any(_table_of(kind, value) == table for kind, value in i.items())]
        forms[table] = plan_firewall.comparable(json.dumps({"nftables": mine})) if mine else ""
    return forms


def _table_of(kind: str, value: object) -> str:
    if not isinstance(value, Mapping):
        return ""
    return str(value.get("name" if kind == "table" else "table", ""))


def observe(wanted: Sequence[Firewall], units: Mapping[str, UnitState], commands: Commands) -> dict[str, FirewallSeen]:
    """The files and the loaded form of each wanted table."""
    forms = loaded([want.table for want in wanted], commands)
    main = observe_path(MAIN, read=True).content
    drop_in = observe_path(SERVICE_DROP_IN, read=True).content
    service = units.get(SERVICE, UnitState(SERVICE))
    seen = {}
    for want in wanted:
        kept = json.loads(observe_path(f"{KEPT}/{want.table}.json", read=True).content or "{}")
        file = observe_path(want.path, read=True).content
        form = forms[want.table]
        seen[want.table] = FirewallSeen(
            file, main, form, kept.get("form", ""), kept.get("hash", ""), service=service, drop_in=drop_in
        )
    return seen


def before(tables: Sequence[str], commands: Commands) -> dict[str, str]:
    """The text of each table as nft would load it again; "" when there is none."""
    found = {}
    for table in tables:
        done = commands.run(["/usr/sbin/nft", "list", "table", "inet", table])
        found[table] = done.out if done.code == 0 else ""
    return found


def check(want: Firewall, commands: Commands) -> None:
    """Have nft read the ruleset without loading it; NodeError with what it says, nothing where it is not installed."""
    done = commands.run(["/usr/sbin/nft", "--check", "-f", "-"], stdin=plan_firewall.text_of(want))
    if done.code not in (0, 127):
        raise NodeError(f"nft does not take the ruleset of table {want.table}, nothing was changed: {done.tail(4)}")


def load(wanted: Sequence[Firewall], commands: Commands) -> None:
    """Load the tables as one transaction."""
    text = "".join(plan_firewall.text_of(want) for want in wanted)
    done = commands.run(["/usr/sbin/nft", "-f", "-"], stdin=text)
    if done.code != 0:
        raise NodeError(f"nft does not take the ruleset, nothing was changed: {done.tail(4)}")


def keep(actions: Sequence[Action], wanted: Sequence[Firewall], commands: Commands) -> None:
    """Write the files, have the service load them at boot, and note the loaded form of each table."""
    for action in actions:
        if action.kind == "firewall_file":
            os.makedirs(os.path.dirname(action.target), mode=0o755, exist_ok=True)
            write_atomically(action.target, action.payload, "root", "root", 0o644)
    forms = loaded([want.table for want in wanted], commands)
    os.makedirs(KEPT, mode=0o700, exist_ok=True)
    for want in wanted:
        if not forms[want.table]:
            raise NodeError(f"table inet {want.table} was loaded and is gone again: something else flushes the ruleset")
        kept = {"hash": plan_firewall.text_hash(plan_firewall.text_of(want)), "form": forms[want.table]}
        write_atomically(f"{KEPT}/{want.table}.json", json.dumps(kept), "root", "root", 0o600)
    boot = {str(a.payload) for a in actions if a.kind == "firewall_boot"}
    if boot or any(a.target == SERVICE_DROP_IN for a in actions):
        commands.must(["systemctl", "daemon-reload"], "telling systemd about nftables.service")
    for verb in ("enable", "start"):
        if verb in boot:
            commands.must(["systemctl", "--quiet", verb, SERVICE], f"systemctl {verb} {SERVICE}")
