#!/usr/bin/env bash
# A Docker engine and 'docker compose' for the tests that need them, where there are none:
#
#   tests/e2e/engine.sh start    starts no engine where one answers (DOCKER_HOST, or the usual socket)
#   tests/e2e/engine.sh stop     stops what start has started, and nothing else
#
# Prints the line that sets DOCKER_HOST if the engine is not where Docker looks by itself. Images are kept in
# BREAKHIS_E2E_DOCKER for the next time.
set -euo pipefail

root=${BREAKHIS_E2E_DOCKER:-/var/tmp/breakhis-e2e-docker}
mirror=${MIRROR:-http://deb.debian.org/debian}
default=unix:///var/run/docker.sock
pid_file=$root/dockerd.pid
say() { echo "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# The engine that start has started, if it runs: a pid alone may be another process by now.
ours() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) && tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -q -x -e "--data-root=$root/data" && echo "$pid"
}

answers() { timeout 20 docker ${1:+--host "$1"} info >/dev/null 2>&1; }

start() {
  local host=${DOCKER_HOST:-$default} missing=() package
  if answers; then
    say "a Docker engine answers already at $host"
  else
    [[ $EUID -eq 0 ]] || fail "no Docker engine answers at $host, and starting one needs root"
    [[ $host == unix://* ]] || fail "no Docker engine answers at $host (DOCKER_HOST); one can be started for unix:// only"
    command -v dockerd >/dev/null || missing+=(docker.io)
    command -v docker >/dev/null || missing+=(docker.io)
    for package in debootstrap iptables; do command -v "$package" >/dev/null || missing+=("$package"); done
    if [[ ${#missing[@]} -gt 0 ]]; then
      command -v apt-get >/dev/null || fail "missing: ${missing[*]}; install them (this script knows how on Debian only)"
      say "installing ${missing[*]}"
      { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"; } >&2
    fi
    # Where a service manager runs, the package has started one.
    if answers; then say "a Docker engine answers now at $host"; else run_engine "$host"; fi
  fi
  have_compose
  [[ $host == "$default" ]] || echo "export DOCKER_HOST=$host"
}

run_engine() {
  local host=$1 pid
  [[ -z $(ours) ]] || fail "the engine of $root runs (pid $(cat "$pid_file")) and does not answer; see $root/dockerd.log"
  # Two engines on one machine take each other's bridge away.
  ! grep -q -s -x dockerd /proc/[0-9]*/comm || fail "a dockerd runs here already and does not answer at $host: set DOCKER_HOST to where it does"
  mkdir -p "$root"
  rm -f "$pid_file"
  setsid dockerd --host="$host" --data-root="$root/data" --exec-root="$root/run" --pidfile="$pid_file" \
    </dev/null >"$root/dockerd.log" 2>&1 &
  pid=$!
  for _ in {1..120}; do
    if answers "$host"; then
      say "started a Docker engine at $host, its data in $root"
      remove_leftovers "$host"
      return
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.5
  done
  tail -n 20 "$root/dockerd.log" >&2
  ! kill "$pid" 2>/dev/null || say "stopping it"
  fail "dockerd did not start; its log is $root/dockerd.log"
}

# Stacks of tests that were killed: with the engine their containers would start again.
remove_leftovers() {
  local found
  found=$(docker --host "$1" ps --all --quiet --filter name=breakhis-test-)
  [[ -z $found ]] || { say "removing what an earlier run has left"; xargs docker --host "$1" rm --force --volumes <<<"$found" >/dev/null; }
}

# Debian 12 has no 'docker compose'; Debian 13's runs here, too. For this user alone, and without a change to what apt
# knows of this machine.
have_compose() {
  ! docker compose version >/dev/null 2>&1 || return 0
  command -v apt-get >/dev/null || fail "'docker compose' is missing: install Docker's plugin compose"
  local folder keys=/usr/share/keyrings/debian-archive-keyring.gpg options
  [[ -e $keys ]] || fail "'docker compose' is missing: install docker-compose-v2 or docker-compose-plugin"
  folder=$(mktemp --directory)
  mkdir -p "$folder"/{lists,cache/archives}/partial "$folder"/none
  echo "deb [signed-by=$keys] $mirror trixie main" >"$folder/sources.list"
  options=(-o "Dir::Etc::sourcelist=$folder/sources.list" -o "Dir::Etc::sourceparts=$folder/none"
    -o "Dir::Etc::preferencesparts=$folder/none" -o "Dir::Etc::preferences=$folder/none/none"
    -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o "APT::Sandbox::User=$(id --user --name)")
  say "fetching Docker's plugin compose from $mirror"
  (cd "$folder" && apt-get -qq "${options[@]}" update && apt-get -qq "${options[@]}" download docker-compose) >&2
  dpkg -x "$folder"/docker-compose_*.deb "$folder/files"
  install -D --mode 0755 "$folder/files/usr/libexec/docker/cli-plugins/docker-compose" \
    "${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins/docker-compose"
  rm -rf "$folder"
  docker compose version >&2
}

stop() {
  local pid
  pid=$(ours) || { say "no engine of ours runs"; return; }
  kill "$pid"
  for _ in {1..120}; do
    [[ -n $(ours) ]] || { say "stopped the engine of $root; its images stay there"; return; }
    sleep 0.5
  done
  fail "the engine of $root (pid $pid) does not stop; see $root/dockerd.log"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  *) say "usage: tests/e2e/engine.sh start | stop"; exit 2 ;;
esac
