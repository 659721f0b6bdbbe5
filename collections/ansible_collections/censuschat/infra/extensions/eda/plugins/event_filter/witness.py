# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Turns what a witness posted into something that is safe to hand on."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

DOCUMENTATION = r"""
name: witness
short_description: Take a witness's token and message out of a webhook event
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Comes right after P(eda.builtin.webhook#event_source). The event that it returns holds one text, C(alert), the
    base64 of a JSON document with C(witness) (the SHA-256 of the witness's token) and C(payload).
  - So no token reaches the rule engine, its log, an audit of events or a playbook's variables, and no text that
    somebody posted is ever taken for a template.
options:
  header:
    description: The header that holds the witness's token.
    type: str
    default: X-Witness-Token
"""

EXAMPLES = r"""
- eda.builtin.webhook:
    port: 5000
  filters:
    - censuschat.infra.witness:
        header: X-Witness-Token
"""


def main(event: dict[str, Any], header: str = "X-Witness-Token") -> dict[str, Any]:
    """The event with nothing in it but the digest and the message; without a token the digest is empty."""
    headers = {str(k).lower(): str(v) for k, v in event.get("meta", {}).get("headers", {}).items()}
    token = headers.get(header.lower(), "").strip()
    document = {
        "witness": hashlib.sha256(token.encode()).hexdigest() if token else "",
        "payload": event.get("payload"),
    }
    return {"alert": base64.b64encode(json.dumps(document).encode()).decode()}
