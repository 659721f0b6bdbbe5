# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the Kubernetes modules find the API and prove who they are."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  kubeconfig:
    description:
      - Path of the kubeconfig on the host that the task runs on.
      - Without it E(KUBECONFIG) is followed, then the service account of the pod that the task runs in, then
        C(~/.kube/config).
      - Client certificates, tokens, token files and C(exec) credential programs are understood. A credential that
        expires during the task is got anew.
    type: path
  context:
    description: The context of the kubeconfig. Without it, its current one.
    type: str
requirements:
  - urllib3 >= 1.26
  - PyYAML >= 5.4
"""
