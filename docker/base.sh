#!/usr/bin/env bash
# Make a base image of Debian's packages, for hosts that reach a Debian mirror but no registry: docker/base.sh [NAME]
set -euo pipefail
name=${1:-breakhis-base:bookworm}

if docker image inspect "$name" >/dev/null 2>&1; then
  echo "$name is there already"
  exit
fi
command -v debootstrap >/dev/null || { echo "error: debootstrap is missing (Debian, Ubuntu: apt install debootstrap)" >&2; exit 1; }
[[ $EUID -eq 0 ]] || { echo "error: debootstrap needs root; run: sudo $0 $name" >&2; exit 1; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" >&2
tar --directory "$folder" --create . | docker import - "$name" >/dev/null
echo "made $name"
