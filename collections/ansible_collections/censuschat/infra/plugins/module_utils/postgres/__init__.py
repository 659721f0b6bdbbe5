# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""PostgreSQL under Patroni: who founds the database, how a region's cluster stands, what is to be repaired."""
