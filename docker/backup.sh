#!/usr/bin/env bash
# Backup of the stack of docker-compose.yaml, by what every Postgres and every S3 store can do:
#
#   docker/backup.sh save FOLDER       writes databases and objects into a new folder
#   docker/backup.sh restore FOLDER    puts them into a stack that was never started, before its first start
#
# docs/deploy.md says when.
set -euo pipefail

say() { echo "$*" >&2; }
fail() { say "error: $*"; exit 1; }
[[ $# -eq 2 && ($1 == save || $1 == restore) ]] || { say "usage: docker/backup.sh save FOLDER | restore FOLDER"; exit 2; }
[[ $2 == /* ]] && folder=$2 || folder=$PWD/$2
cd "$(dirname "$0")/.."

databases=(airflow mlflow mlflow_users)
in_postgres() { docker compose exec --no-TTY postgres "$@"; }
with_buckets() { docker compose run --rm --no-TTY --no-deps buckets python3 /opt/breakhis/docker/servers.py "$@"; }

save() {
  local database scratch=$folder.part
  [[ ! -e $folder ]] || fail "$folder is there already"
  rm -rf "$scratch"
  (umask 077 && mkdir -p "$scratch")
  # Databases first: what they name is in the store by then, and nothing there is ever replaced.
  for database in "${databases[@]}"; do
    in_postgres pg_dump --username airflow --format custom "$database" >"$scratch/$database.dump"
  done
  with_buckets save >"$scratch/objects.tar"
  mv "$scratch" "$folder"
  say "saved into $folder: $(du -sh "$folder" | cut -f1)"
}

restore() {
  local database
  for database in "${databases[@]}"; do
    [[ -s $folder/$database.dump ]] || fail "$folder has no $database.dump; is it a backup?"
  done
  docker compose up --detach --wait postgres s3 >&2
  with_buckets buckets >&2
  with_buckets load <"$folder/objects.tar"
  for database in "${databases[@]}"; do
    in_postgres pg_restore --username airflow --dbname "$database" --exit-on-error --single-transaction <"$folder/$database.dump"
  done
  say "restored from $folder; docker compose up --detach --wait starts the rest"
}

"$1"
