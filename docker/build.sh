#!/usr/bin/env bash
# Build the images of docker-compose.yaml: docker/build.sh [--standins]
#
#   TAG=latest                their tag
#   BASE_IMAGE=…              another base: one that docker/base.sh made, where no registry can be reached
#   DEVICE=gpu                a trainer for GPUs (3 GB more); default: cpu
#   BUILD_NETWORK=host        the network that builds use
#   CERTIFICATES=FOLDER       authorities (*.crt) to trust besides Debian's
#
# --standins builds what stands in for the public images of Postgres, Redis and S3, too, from Debian and PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
export DOCKER_BUILDKIT=1
tag=${TAG:-latest}
arguments=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
[[ -n ${BASE_IMAGE:-} ]] && arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[[ -n ${BUILD_NETWORK:-} ]] && arguments+=(--network "$BUILD_NETWORK")

if [[ -n ${CERTIFICATES:-} ]]; then
  mapfile -t added < <(find "$CERTIFICATES" -maxdepth 1 -name '*.crt' -printf '%f\n')
  for file in "${added[@]}"; do
    [[ -e docker/certificates/$file ]] || cp "$CERTIFICATES/$file" docker/certificates/
  done
fi

build() { # IMAGE FILE TARGET [ARGUMENT…]
  echo "building $1:$tag" >&2
  docker build --quiet --file "$2" --target "$3" --tag "$1:$tag" "${arguments[@]}" "${@:4}" . >/dev/null
}

for target in airflow trainer mlflow engine-proxy; do
  build "breakhis-$target" docker/Dockerfile "$target" --build-arg "DEVICE=${DEVICE:-cpu}"
done
if [[ ${1:-} == --standins ]]; then
  for target in postgres redis s3; do
    build "breakhis-standin-$target" docker/standins/Dockerfile "$target"
  done
fi
