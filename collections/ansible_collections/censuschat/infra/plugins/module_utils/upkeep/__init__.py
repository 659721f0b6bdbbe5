# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keeping a kubeadm control plane alive: etcd snapshots, their way back, and certificates.

The files run on the nodes as they are, from /usr/local/lib/censuschat, and inside Ansible's modules. So they use the
standard library of Python 3.11, relative imports, and the programs that a control plane has.
"""
