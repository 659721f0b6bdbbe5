"""Where a runbook runs: an Ansible inventory, read through Ansible's own library, and what the runbooks need of it."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runbooks import vault
from runbooks.database import is_url, without_password
from runbooks.errors import Problem, one_line
from runbooks.journal import Journal, remember, state_home

ROOT = Path(__file__).resolve().parent.parent
ANSIBLE_CONFIG = ROOT / "ansible.cfg"


@dataclass(frozen=True, slots=True)
class Node:
    """How Ansible reaches one host; local when it is this machine, without ssh."""

    name: str
    address: str
    port: int
    user: str | None
    key: Path | None
    ssh_args: tuple[str, ...]
    local: bool


def _unlock(loader: Any) -> None:
    """Let the loader read vaulted variables, by the passwords that ansible-playbook would find.

    Raises AnsibleError when there are none that can be read.
    """
    from ansible import constants
    from ansible.parsing.vault import VaultSecretsContext

    known = VaultSecretsContext.current(optional=True)
    if known is not None:  # In ansible-playbook, or for the second inventory of this process.
        loader.set_vault_secrets(known.secrets)
    elif constants.DEFAULT_VAULT_PASSWORD_FILE or constants.DEFAULT_VAULT_IDENTITY_LIST:
        from ansible.cli import CLI

        identities = constants.DEFAULT_VAULT_IDENTITY_LIST
        loader.set_vault_secrets(CLI.setup_vault_secrets(loader, vault_ids=identities, auto_prompt=False))


class Environment:
    """One inventory. Variables are templated one by one when asked for: others may have side effects (lookups).

    Raises Problem when the inventory cannot be read or names no environment.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Problem(
                f"There is no inventory at {path}", code="inventory-missing", next_command="runbook run --help"
            )
        os.environ.setdefault("ANSIBLE_CONFIG", str(ANSIBLE_CONFIG))
        from ansible import constants
        from ansible.errors import AnsibleError
        from ansible.inventory.manager import InventoryManager
        from ansible.parsing.dataloader import DataLoader
        from ansible.plugins.loader import init_plugin_loader
        from ansible.utils.collection_loader import AnsibleCollectionConfig
        from ansible.vars.manager import VariableManager

        self.path = path.resolve()
        if AnsibleCollectionConfig.collection_finder is None:  # Once a process; in ansible-playbook it has been done.
            init_plugin_loader()
        # An inventory of which a part cannot be read is not the environment: Ansible would only warn.
        constants.INVENTORY_ANY_UNPARSED_IS_FAILED = True
        self._loader = DataLoader()
        warnings = io.StringIO()
        try:
            _unlock(self._loader)
            # Ansible explains a broken inventory in warnings, one a plugin that it tried.
            with contextlib.redirect_stderr(warnings):
                self._inventory = InventoryManager(loader=self._loader, sources=[str(self.path)])
            self._variables = VariableManager(loader=self._loader, inventory=self._inventory)
            hosts = self._inventory.get_hosts("all")
            self._raw: Mapping[str, Any] = self._variables.get_vars(host=hosts[0]) if hosts else {}
        except AnsibleError as error:
            reason = next((line for line in warnings.getvalue().splitlines() if "WARNING" in line), str(error))
            raise Problem(
                f"The inventory {path} cannot be read: {one_line(reason.removeprefix('[WARNING]: '))}",
                code="inventory-unreadable",
                next_command=f"ansible-inventory -i {path} --list",
            ) from error
        sys.stderr.write(warnings.getvalue())
        if not hosts:
            raise Problem(
                f"The inventory {path} holds no hosts",
                code="inventory-without-hosts",
                next_command=f"ansible-inventory -i {path} --list",
            )
        self.name = str(self.require("environment_name"))

    def template(self, value: Any, **variables: Any) -> Any:
        """The value with its templates filled in from the inventory's variables and the given ones.

        Raises Problem when a variable is missing.
        """
        return self._template(value, {**self._raw, **variables}, str(value))

    def _template(self, value: Any, variables: dict[str, Any], what: str) -> Any:
        from ansible.errors import AnsibleError
        from ansible.template import Templar, trust_as_template

        if isinstance(value, str):
            value = trust_as_template(value)
        try:
            return Templar(loader=self._loader, variables=variables).template(value)
        except AnsibleError as error:
            raise Problem(
                f"The inventory {self.path} does not yield {what}: {one_line(str(error))}",
                code="inventory-template",
                next_command=f"ansible-inventory -i {self.path} --list",
            ) from error

    def get(self, name: str, default: Any = None) -> Any:
        """A variable of the environment."""
        return self.template(self._raw[name]) if name in self._raw else default

    def raw(self, name: str) -> Any:
        """A variable of the environment before its templates are filled in, for whoever fills them in part by part."""
        return self._raw.get(name)

    def require(self, name: str) -> Any:
        """A variable of the environment. Raises Problem when there is none."""
        if name not in self._raw:
            raise Problem(
                f"The inventory {self.path} does not set {name}",
                code="inventory-variable-missing",
                next_command=f"ansible-inventory -i {self.path} --list",
            )
        return self.get(name)

    @functools.cached_property
    def vaulted(self) -> frozenset[str]:
        """The texts that the inventory keeps encrypted: they are not to be written down anywhere."""
        return vault.values(self.path, self._loader)

    @property
    def state_directory(self) -> Path:
        """Where the journal and the reports of this environment are kept."""
        given = self.get("runbook_state")
        return Path(str(given)).expanduser() if given else state_home() / self.name

    @property
    def journal_location(self) -> Path | str:
        """The journal: an SQLite file, or a postgresql:// URL. Raises Problem when that holds a password.

        RUNBOOK_JOURNAL of the process's own environment comes before the inventory's variable (AWX sets it).
        """
        given = os.environ.get("RUNBOOK_JOURNAL") or self.get("runbook_journal")
        if given and is_url(str(given)):
            return without_password(str(given))
        return Path(str(given)).expanduser() if given else self.state_directory / "journal.sqlite"

    def has_journal(self) -> bool:
        """Whether there may be a journal already; a shared database counts as one."""
        location = self.journal_location
        return isinstance(location, str) or location.exists()

    def open_journal(self) -> Journal:
        """The environment's journal, made when there is none. Raises Problem."""
        return Journal(self.journal_location, self.name, self.state_directory, anchors=self.anchors)

    def remember(self, journal: Journal) -> None:
        """Note it in the operator's state directory, with what it takes to judge it without the inventory."""
        remember(self.name, journal.directory, journal.location, self.anchors, self.journal_keys)

    @property
    def anchors(self) -> list[dict[str, Any]]:
        """Where the end of the chain is noted outside the journal (variable runbook_anchors)."""
        return [dict(anchor) for anchor in self.get("runbook_anchors") or []]

    @property
    def journal_keys(self) -> dict[str, str]:
        """Whose records are trusted (variable runbook_journal_keys): name -> public key."""
        return {str(name): str(key) for name, key in (self.get("runbook_journal_keys") or {}).items()}

    @property
    def ledgers(self) -> Path | None:
        """Where the clients' ledgers are, if the environment has any."""
        given = self.get("runbook_ledgers")
        return Path(str(given)).expanduser() if given else None

    def help(self, topic: str, default: str) -> str:
        """The environment's own next command for a fault (variable runbook_help: topic -> command)."""
        return str((self.get("runbook_help") or {}).get(topic, default))

    def hosts(self) -> list[str]:
        """The names of all hosts."""
        return sorted(host.name for host in self._inventory.get_hosts("all"))

    def nodes(self, pattern: str, *, none: bool = False) -> list[Node]:
        """The hosts that a pattern names. Raises Problem when it names none, unless that may be (``none``)."""
        hosts = self._inventory.get_hosts(pattern)
        if not hosts and not none:
            raise Problem(
                f"The inventory {self.path} has no host that matches {pattern}",
                code="inventory-pattern-empty",
                next_command=f"ansible-inventory -i {self.path} --graph",
            )
        return [self._node(host) for host in hosts]

    def _node(self, host: Any) -> Node:
        raw = self._variables.get_vars(host=host)

        def value(*names: str) -> Any:
            name = next((n for n in names if n in raw), None)
            return None if name is None else self._template(raw[name], raw, f"{name} of {host.name}")

        key = value("ansible_ssh_private_key_file", "ansible_private_key_file")
        extra = [value("ansible_ssh_common_args"), value("ansible_ssh_extra_args")]
        return Node(
            name=host.name,
            address=str(value("ansible_host", "ansible_ssh_host") or host.name),
            port=int(value("ansible_port", "ansible_ssh_port") or 22),
            user=value("ansible_user", "ansible_ssh_user"),
            key=Path(str(key)).expanduser() if key else None,
            ssh_args=tuple(word for text in extra if text for word in shlex.split(str(text))),
            local=value("ansible_connection") == "local",
        )


def ssh_options() -> list[str]:
    """The options that Ansible itself gives to ssh, so that a connection made here is one that its tasks find open."""
    from ansible import constants
    from ansible.plugins.loader import connection_loader

    connection_loader.get("ssh", class_only=True)  # Its options are known once it is loaded.

    def setting(name: str) -> str:
        return str(constants.config.get_config_value(name, plugin_type="connection", plugin_name="ssh") or "")

    directory = Path(setting("control_path_dir")).expanduser()
    options = shlex.split(setting("ssh_args"))
    path = setting("control_path")
    if path:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        options += ["-o", "ControlPath=" + path % {"directory": directory}]
    return options
