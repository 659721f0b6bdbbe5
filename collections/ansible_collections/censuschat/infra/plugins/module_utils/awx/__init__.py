# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The content of an AWX: what it may hold (model), what differs (planner), how it is read and written (content)."""
