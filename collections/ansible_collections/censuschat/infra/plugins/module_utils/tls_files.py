# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The options by which modules find the files for mutual TLS, documented in the fragment of the same name."""

from __future__ import annotations

from typing import Any

#: Where the role node_certificates puts the node's own files.
_OF_NODE = {
    "ca_file": "/etc/censuschat/pki/ca.crt",
    "cert_file": "/etc/censuschat/pki/node.crt",
    "key_file": "/etc/censuschat/pki/node.key",
}


def tls_files(*, required: bool = False) -> dict[str, dict[str, Any]]:
    """The argument spec of ca_file, cert_file and key_file: by default the node's own, or all required."""
    # Ansible takes an option with "key" in its name for a secret; a path is none, and belongs in the log.
    return {
        name: {"type": "path", "no_log": False, **({"required": True} if required else {"default": path})}
        for name, path in _OF_NODE.items()
    }
