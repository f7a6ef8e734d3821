#!/usr/bin/env bash
# One would guess that DockerOperator(cpus=2) lets a container use two CPUs at most, as docker's own option --cpus does.
# The operator sets CpuShares, a weight that counts only while containers compete: alone, one takes all CPUs. NanoCpus,
# the cap that --cpus sets, stays unset.
# This matters where a training runs beside the scheduler on one machine: it has to set the cap in its own way.
# Library: apache-airflow-providers-docker 4.6.1 with apache-airflow 3.3.2. No Docker engine is needed: the client's
# requests end in a stand-in, which keeps what would be sent.
set -euo pipefail

provider="${DOCKER_PROVIDER_VERSION:-4.6.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  "apache-airflow-providers-docker==$provider" apache-airflow==3.3.2

HOME="$work" AIRFLOW_HOME="$work/airflow" AIRFLOW__CORE__LOAD_EXAMPLES=False \
  venv/bin/python -W ignore - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import importlib.metadata
import sys
from unittest import mock

import docker
from airflow.providers.docker.hooks.docker import DockerHook
from airflow.providers.docker.operators.docker import DockerOperator

print("apache-airflow-providers-docker", importlib.metadata.version("apache-airflow-providers-docker"))
client = docker.APIClient(version="1.44")  # asks no engine until a request is made
sent = {}


def create_container(**asked):
    sent.update(asked["host_config"])
    return {"Id": "made-up"}


client.create_container = create_container
for name, answer in {
    "images": [{"Id": "image"}],
    "attach": iter([b"done\n"]),
    "start": None,
    "wait": {"StatusCode": 0},
    "remove_container": None,
}.items():
    setattr(client, name, mock.Mock(return_value=answer))
with mock.patch.object(DockerHook, "api_client", client):
    DockerOperator(task_id="train", image="trainer", cpus=2, mount_tmp_dir=False).execute({})
caps = {name: sent.get(name) for name in ("CpuShares", "NanoCpus", "CpuQuota")}
print("What cpus=2 sends to the engine:")
print(" ", caps)
if caps["CpuShares"] != 2048:
    sys.exit("CHANGED: cpus no longer becomes a weight of 1024 each")
if caps["NanoCpus"] or caps["CpuQuota"]:
    sys.exit("CHANGED: cpus is a cap now")
PY
