# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""A small certificate authority in a directory of the controller, for the nodes of one environment."""
