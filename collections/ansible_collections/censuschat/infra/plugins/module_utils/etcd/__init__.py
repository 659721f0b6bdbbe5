# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One member of an etcd cluster: when it may be restarted, and that it serves."""
