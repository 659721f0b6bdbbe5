# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""An AnsibleModule that keeps its parameters out of the node's journal."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule


class QuietModule(AnsibleModule):  # type: ignore[misc]  # ansible is untyped
    """Logs the names of its parameters only.

    What a whole-state module is given is large, and some of it (file contents) may be secret.
    """

    def _log_invocation(self) -> None:
        given = [name for name, value in self.params.items() if value]
        self.log(f"invoked with {', '.join(given)}", log_args={})
