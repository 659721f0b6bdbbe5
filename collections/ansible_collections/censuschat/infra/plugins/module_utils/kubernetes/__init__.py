# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Self-managed Kubernetes: which step a node needs next to be a member of its cluster, and the hands that take it."""
