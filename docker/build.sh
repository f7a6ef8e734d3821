#!/usr/bin/env bash
# Build the images of docker-compose.yaml: docker/build.sh [--standins] [TARGET…]
#
#   TARGET                        airflow, trainer, mlflow, engine-proxy; default: all of them
#   --standins                    also what stands in for the public images of Postgres, Redis and S3
#
#   TAG=latest                    their tag
#   BASE_IMAGE=NAME               another base than debian:bookworm-slim, such as one made by docker/base.sh
#   DEVICE=gpu                    a trainer for GPUs, with CUDA's libraries; default: cpu
#   BREAKHIS_BUILD_NETWORK=host   build in the host's network
#   BREAKHIS_BUILD_CERTIFICATES=FOLDER   trust the authorities (*.crt) in it, besides those in docker/certificates
#
# HTTP_PROXY, HTTPS_PROXY and NO_PROXY are passed on to the build and are not kept in the images.
set -euo pipefail
cd "$(dirname "$0")/.."

targets=() standins=()
for argument; do
  case $argument in
    --standins) standins=(postgres redis s3) ;;
    airflow | trainer | mlflow | engine-proxy) targets+=("$argument") ;;
    *) echo "usage: docker/build.sh [--standins] [airflow|trainer|mlflow|engine-proxy]…" >&2; exit 2 ;;
  esac
done
[[ ${#targets[@]} -gt 0 ]] || targets=(airflow trainer mlflow engine-proxy)
fail() { echo "error: $*" >&2; exit 1; }

# Docker's client brought BuildKit along until version 23, and since then needs its plugin buildx. Two clients on one
# machine are common enough: take the first that can build.
docker=
while read -r candidate; do
  version=$("$candidate" version --format '{{.Client.Version}}' 2>/dev/null) || true
  if [[ ${version%%.*} =~ ^[0-9]+$ ]] && { ((${version%%.*} < 23)) || "$candidate" buildx version >/dev/null 2>&1; }; then
    docker=$candidate
    break
  fi
done < <(type -ap docker)
[[ -n $docker ]] || fail "no docker here that can build: docker, or its plugin buildx, is missing (docker-buildx-plugin)"
"$docker" version >/dev/null 2>&1 || fail "no Docker engine answers"

copied=()
log=$(mktemp)
trap 'rm -f "$log" "${copied[@]}"' EXIT
if [[ -n ${BREAKHIS_BUILD_CERTIFICATES:-} ]]; then
  [[ -d $BREAKHIS_BUILD_CERTIFICATES ]] || fail "BREAKHIS_BUILD_CERTIFICATES is no folder: $BREAKHIS_BUILD_CERTIFICATES"
  for file in "$BREAKHIS_BUILD_CERTIFICATES"/*.crt; do
    target=docker/certificates/$(basename "$file")
    [[ ! -e $file || -e $target ]] || { copied+=("$target"); cp "$file" "$target"; }
  done
fi

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ -z $(git status --porcelain 2>/dev/null) ]] || revision+=-modified
arguments=(--build-arg "REVISION=$revision")
[[ -z ${BASE_IMAGE:-} ]] || arguments+=(--build-arg BASE_IMAGE)
[[ -z ${BREAKHIS_BUILD_NETWORK:-} ]] || arguments+=(--network "$BREAKHIS_BUILD_NETWORK")
for name in {HTTP,HTTPS,NO}_PROXY {http,https,no}_proxy; do
  [[ -z ${!name:-} ]] || arguments+=(--build-arg "$name")
done

build() { # IMAGE FILE TARGET [ARGUMENT…]
  local image=$1:${TAG:-latest} begun=$SECONDS command size
  command=(env DOCKER_BUILDKIT=1 "$docker" build --file "$2" --target "$3" --tag "$image" "${arguments[@]}" "${@:4}" .)
  if [[ -t 2 ]]; then
    "${command[@]}"
  elif ! "${command[@]}" >"$log" 2>&1; then
    tail --lines 40 "$log" >&2
    fail "$image was not built"
  fi
  size=$("$docker" image inspect --format '{{.Size}}' "$image")
  echo "$image: $((size / 1000000)) MB, $((SECONDS - begun)) s"
}

for target in "${targets[@]}"; do
  device=()
  [[ $target != trainer ]] || device=(--build-arg "DEVICE=${DEVICE:-cpu}")
  build "breakhis-$target" docker/Dockerfile "$target" "${device[@]}"
done
for target in "${standins[@]}"; do
  build "breakhis-standin-$target" docker/standins/Dockerfile "$target"
done
