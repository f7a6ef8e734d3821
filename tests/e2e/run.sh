#!/usr/bin/env bash
# The tests of the compose stack: an engine where there is none, the images, the stack and what happens to it.
set -euo pipefail
cd "$(dirname "$0")/../.."

set_host=$(tests/e2e/engine.sh start)
eval "$set_host"
trap 'tests/e2e/engine.sh stop' EXIT
[[ ${DOCKER_HOST:-} != unix://* ]] || export DOCKER_SOCKET=${DOCKER_HOST#unix://}

# The public images where a registry can be reached; else a base of Debian's packages, and stand-ins for the others.
if [[ -z ${BASE_IMAGE:-} ]] && ! timeout 60 docker pull --quiet debian:bookworm-slim >/dev/null 2>&1; then
  docker/base.sh breakhis-base:bookworm
  export BASE_IMAGE=breakhis-base:bookworm BREAKHIS_BUILD_NETWORK=host BREAKHIS_E2E_STANDINS=1
  export BREAKHIS_BUILD_CERTIFICATES=${BREAKHIS_BUILD_CERTIFICATES:-/usr/local/share/ca-certificates}
fi
docker/build.sh ${BREAKHIS_E2E_STANDINS:+--standins}
BREAKHIS_E2E=1 .venv/bin/pytest tests/e2e/test_compose.py --capture=no "$@"
