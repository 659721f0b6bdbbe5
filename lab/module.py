"""What the modules of the lab's playbooks have in common: the options that name the lab, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import topology
from lab.background import BackgroundError

#: Options of a module that looks at the lab or builds a part of it.
INVENTORY: dict[str, Any] = {"inventory": {"type": "path", "required": True}}
#: Options of a module that also removes its part, for which no inventory is needed; go with `PRESENT_NEEDS_INVENTORY`.
INVENTORY_AND_STATE: dict[str, Any] = {
    "inventory": {"type": "path"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}
PRESENT_NEEDS_INVENTORY = [("state", "present", ["inventory"])]


def described(module: AnsibleModule) -> topology.Topology:
    """The lab of the inventory that the module was given. Raises TopologyError."""
    return topology.load(Path(module.params["inventory"]))


def answer(module: AnsibleModule, work: Callable[[AnsibleModule], dict[str, Any]]) -> None:
    """Exit with what `work` returns, changed when that names actions; an error of the lab fails in its own words."""
    try:
        result = work(module)
    # RuntimeError is what the lab's other parts derive their errors from.
    except (topology.TopologyError, BackgroundError, RuntimeError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(result.get("actions")), **result)
