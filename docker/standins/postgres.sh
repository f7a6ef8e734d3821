#!/usr/bin/env bash
# Start as the official image does: on the first start a cluster, a user and a database, then what lies in
# /docker-entrypoint-initdb.d.
set -Eeuo pipefail

if [[ ${1:-} != postgres && ${1:-} != -* ]]; then
  exec "$@"
fi
[[ ${1:-} == postgres ]] && shift

user=${POSTGRES_USER:-postgres}
database=${POSTGRES_DB:-$user}

first_start() {
  : "${POSTGRES_PASSWORD:?is not set: the first start needs a password for $user}"
  # A half-made cluster would pass for a finished one at the next start.
  trap 'echo "error: the first start failed; its cluster is removed" >&2
        pg_ctl --wait --mode immediate stop >/dev/null 2>&1 || true
        find "$PGDATA" -mindepth 1 -delete' ERR
  initdb --username="$user" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") --encoding=UTF8 --locale=C.UTF-8 \
    --auth-local=trust --auth-host=scram-sha-256 >/dev/null
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"

  # On its socket alone: whoever waits for the port finds a database that is ready.
  pg_ctl --wait --options "-c listen_addresses=''" start >/dev/null
  [[ $database == postgres ]] || createdb --username "$user" "$database"
  local file
  shopt -s nullglob
  for file in /docker-entrypoint-initdb.d/*; do
    echo "running $file"
    case $file in
      *.sh) if [[ -x $file ]]; then "$file"; else bash "$file"; fi ;;
      *.sql) psql --no-psqlrc -v ON_ERROR_STOP=1 --username "$user" --dbname "$database" --file "$file" ;;
    esac
  done
  pg_ctl --wait --mode fast stop >/dev/null
  trap - ERR
}

[[ -s $PGDATA/PG_VERSION ]] || first_start
exec postgres -c listen_addresses='*' "$@"
