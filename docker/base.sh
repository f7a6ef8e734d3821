#!/usr/bin/env bash
# Make a base image for docker/build.sh out of Debian's packages, where a Debian mirror can be reached and no registry:
#
#   docker/base.sh [NAME] [--force]     NAME: default breakhis-base:bookworm; --force makes it anew
#
#   MIRROR, SECURITY_MIRROR             Debian mirrors other than http://deb.debian.org/debian and …/debian-security
set -euo pipefail

name=breakhis-base:bookworm force=
for argument; do
  case $argument in
    --force) force=yes ;;
    -*) echo "usage: docker/base.sh [NAME] [--force]" >&2; exit 2 ;;
    *) name=$argument ;;
  esac
done
fail() { echo "error: $*" >&2; exit 1; }

docker version >/dev/null 2>&1 || fail "no Docker engine answers"
if [[ -z $force ]] && docker image inspect "$name" >/dev/null 2>&1; then
  echo "$name is there already; --force makes it anew"
  exit
fi
command -v debootstrap >/dev/null || fail "debootstrap is missing (Debian, Ubuntu: apt install debootstrap)"
[[ $EUID -eq 0 ]] || fail "debootstrap needs root: sudo $0 $*"

mirror=${MIRROR:-http://deb.debian.org/debian}
folder=$(mktemp --directory)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" "$mirror" >&2
cat > "$folder/etc/apt/sources.list" <<SOURCES
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb ${SECURITY_MIRROR:-http://deb.debian.org/debian-security} bookworm-security main
SOURCES
chroot "$folder" sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get upgrade --yes' >&2
# What belongs to this host, and what can be fetched again.
rm -rf "$folder"/etc/{hostname,resolv.conf} "$folder"/var/{cache/apt,lib/apt/lists,log}/*
tar --directory "$folder" --numeric-owner --create . | docker import --change 'CMD ["bash"]' - "$name" >/dev/null
echo "made $name"
