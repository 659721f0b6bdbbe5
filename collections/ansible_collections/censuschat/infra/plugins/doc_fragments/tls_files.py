# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Options of module_utils/tls_files.py; a module's own documentation says whether they are required or default."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  ca_file:
    description: The authority that signed the certificates of the other side.
    type: path
  cert_file:
    description: Client certificate.
    type: path
  key_file:
    description: Key of O(cert_file).
    type: path
"""
