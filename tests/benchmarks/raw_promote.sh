#!/bin/sh
# Times a bare pg_promote: a PostgreSQL 15 primary and a caught-up standby of their own, beside the lab's database,
# on unix sockets only. Prints psql's "Time: … ms" last.
set -eu
# Ansible's temporary files are root's alone: hand the script over as standard input.
[ "$(id -u)" != 0 ] || exec runuser -u postgres -- sh -s <"$0"
bin=/usr/lib/postgresql/15/bin
work=$(mktemp -d)
cd "$work"
stop() { "$bin/pg_ctl" -s -D "$work/$1" stop -m immediate || true; }
trap 'stop standby; rm -rf "$work"' EXIT
"$bin/initdb" -D primary -A trust >/dev/null
"$bin/pg_ctl" -s -w -D primary -o "-p 55432 -k $work -c listen_addresses=" -l primary.log start
"$bin/pg_basebackup" -h "$work" -p 55432 -D standby -R
"$bin/pg_ctl" -s -w -D standby -o "-p 55433 -k $work -c listen_addresses=" -l standby.log start
psql -h "$work" -p 55432 -qc 'create table t as select generate_series(1, 1000)' postgres
until [ "$(psql -h "$work" -p 55433 -Atc "select count(*) from pg_tables where tablename = 't'" postgres)" = 1 ]; do
    sleep 0.1
done
stop primary
printf '\\timing on\nselect pg_promote(true, 60);\n' | psql -h "$work" -p 55433 -At postgres
