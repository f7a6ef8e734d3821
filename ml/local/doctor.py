"""Checks this machine: what the system needs, what there is, and what to do about what is missing."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import requests

from ml.core.airflow_api import AirflowApi
from ml.core.errors import BreakhisError
from ml.core.messages import cut_text, hide_access
from ml.core.s3_access import find_outage
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources.kaggle_login import TOKEN_PAGE, find_credentials
from ml.local.airflow_server import POOLS, find_pool_trouble
from ml.local.gpus import count_gpus
from ml.local.ports import HOST, free_ports
from ml.local.stack import Stack
from ml.training.backbone_weights import find_weights_file
from ml.training.imagenet_download import IMAGENET_URL, imagenet_cache_file

GIB = 2**30
DISK_DEMO = 3 * GIB
DISK_BREAKHIS = 10 * GIB
MEMORY_REQUIRED = 3 * GIB
MEMORY_RECOMMENDED = 6 * GIB

_SECONDS_TO_ANSWER = 5.0

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """What one check found. State ``missing``: nothing works without it; ``warning``: something does not work."""

    name: str
    state: State
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """Returns it as ``breakhis doctor --json`` prints it."""
        return asdict(self)


def check_machine(settings: Settings) -> list[Check]:
    """Runs all checks. It takes seconds, and some ten more where there is a GPU, about which TensorFlow is asked."""
    checks: list[Callable[[], Check]] = [
        check_python,
        lambda: check_disk(settings.home),
        check_memory,
        lambda: check_ports(settings),
        lambda: check_pools(settings),
        lambda: check_store(settings.store),
        lambda: check_weights(settings.weights),
        check_kaggle,
        check_gpu,
        check_docker,
    ]
    return [check() for check in checks]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Checks that this is Python 3.11 to 3.13; TensorFlow has no build for later ones."""
    found = platform.python_version()
    if (3, 11) <= version < (3, 14):
        return Check("Python", "ok", found)
    return Check("Python", "missing", ".".join(map(str, version)), "install Python 3.11, 3.12 or 3.13")


def check_disk(home: Path, free: int | None = None) -> Check:
    """Checks the free space of the home folder's disk, in bytes, against what the demo and all of BreakHis need."""
    parent = _find_existing_folder(home)
    free = shutil.disk_usage(parent).free if free is None else free
    found = f"{free / GIB:.0f} GiB free in {parent}"
    if free < DISK_DEMO:
        return Check("Disk", "missing", found, f"free {DISK_DEMO / GIB:.0f} GiB, or set BREAKHIS_HOME to another disk")
    if free < DISK_BREAKHIS:
        advice = f"enough for the demo; the whole of BreakHis needs {DISK_BREAKHIS / GIB:.0f} GiB"
        return Check("Disk", "warning", found, advice)
    return Check("Disk", "ok", found)


def check_memory(total: int | None = None) -> Check:
    """Checks that the memory, in bytes, is enough for Airflow, MLflow and two trainings at a time."""
    total = psutil.virtual_memory().total if total is None else total
    found = f"{total / GIB:.0f} GiB"
    if total < MEMORY_REQUIRED:
        return Check("Memory", "missing", found, f"Airflow, MLflow and a training need {MEMORY_REQUIRED / GIB:.0f} GiB")
    if total < MEMORY_RECOMMENDED:
        return Check("Memory", "warning", found, "two trainings at a time may not fit: set BREAKHIS_GPUS=1")
    return Check("Memory", "ok", found)


def check_ports(settings: Settings) -> Check:
    """Checks the usual ports of Airflow and MLflow; where they are taken, the local stack uses others."""
    preferred = {8080: "Airflow", 5000: "MLflow"}
    state = Stack(settings).state()
    if state and all(service.process.is_alive() for service in state.services.values()):
        return Check("Ports", "ok", "in use by our " + ", ".join(s.url for s in state.services.values()))
    with free_ports(*preferred) as reserved:
        taken = [port for port, other in zip(preferred, reserved, strict=True) if port != other]
    if taken:
        found = ", ".join(f"{port} ({preferred[port]})" for port in taken) + f" taken on {HOST}"
        return Check("Ports", "warning", found, "nothing: others are used, 'breakhis status' says which")
    return Check("Ports", "ok", f"{' and '.join(map(str, preferred))} are free")


def check_pools(settings: Settings) -> Check:
    """Checks the pools that tasks name, in the Airflow that the settings name or else in the local stack's."""
    name = "Airflow's pools"
    state = Stack(settings).state()
    if settings.airflow_url:
        api = AirflowApi(
            settings.airflow_url,
            settings.airflow_user,
            settings.airflow_password.get_secret_value(),
            timeout=_SECONDS_TO_ANSWER * 2,
        )
    elif state and state.services["airflow"].process.is_alive():
        api = Stack(settings).api("admin")
    else:
        return Check(name, "ok", "no Airflow runs here; 'breakhis up' makes them")
    try:
        trouble = find_pool_trouble(api)
    except BreakhisError as error:
        return Check(name, "warning", str(error), "see to it that Airflow answers, and check again")
    if trouble:
        found, _, advice = trouble.partition("; ")
        return Check(name, "missing", f"{api.shown_url}: {found}", advice)
    return Check(name, "ok", f"{' and '.join(POOLS)}, at {api.shown_url}")


def check_store(root: str) -> Check:
    """Checks that the store can be written."""
    if root.startswith("file:///"):
        folder = _find_existing_folder(Path(root.removeprefix("file://")))
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return Check("Store", "missing", f"{root}: {error.strerror}", "set BREAKHIS_STORE to where you may write")
        return Check("Store", "ok", root)
    try:
        Store(root).put_json("tmp/doctor.json", {"written by": "breakhis doctor"})
    except Exception as error:  # boto3 has many errors, each of which means that the store cannot be used
        explained = error if isinstance(error, BreakhisError) else find_outage(error)
        reason = f"{root}: {explained or f'{type(error).__name__}: {cut_text(hide_access(error))}'}"
        return Check("Store", "missing", reason, "check the bucket, AWS_ENDPOINT_URL and the AWS credentials")
    return Check("Store", "ok", root)


def check_weights(setting: str, url: str = IMAGENET_URL) -> Check:
    """Checks that the backbone's weights, by BREAKHIS_WEIGHTS, are there or can be downloaded."""
    name = "Backbone weights"
    if setting == "random":
        return Check(name, "warning", setting, "good enough to try the workflow; unset BREAKHIS_WEIGHTS for ImageNet's")
    if setting == "imagenet":
        return _check_imagenet(name, url)
    if "://" in setting and not setting.startswith("file://"):
        return Check(name, "ok", f"{setting} (not checked)")
    if find_weights_file(setting):
        return Check(name, "ok", setting)
    return Check(name, "missing", f"{setting}: no such file", "set BREAKHIS_WEIGHTS to a file, imagenet or random")


def _check_imagenet(name: str, url: str) -> Check:
    cached = imagenet_cache_file()
    if cached.is_file():
        return Check(name, "ok", f"ImageNet, in {cached}")
    try:
        answer = requests.head(url, timeout=_SECONDS_TO_ANSWER, allow_redirects=True)
        trouble = "" if answer.ok else f"{url} answers {answer.status_code}"
    except requests.RequestException as error:
        trouble = f"{url} cannot be reached ({type(error).__name__})"
    if not trouble:
        return Check(name, "ok", "ImageNet, will be downloaded")
    advice = (
        "the demo takes random weights then, other sets fail; "
        f"set BREAKHIS_WEIGHTS to a copy of {Path(url).name} on disk or in the store"
    )
    return Check(name, "warning", trouble, advice)


def check_kaggle() -> Check:
    """Checks for credentials for Kaggle, which sources of kind ``kaggle`` need."""
    found = find_credentials()
    if found:
        return Check("Kaggle", "ok", f"credentials in {found}")
    advice = f"needed for sources from Kaggle only: make a token at {TOKEN_PAGE} and set KAGGLE_API_TOKEN"
    return Check("Kaggle", "warning", "no credentials", advice)


def check_gpu() -> Check:
    """Checks for NVIDIA GPUs, and whether TensorFlow can use them."""
    count = count_gpus()
    if not count:
        return Check("GPU", "warning", "none found by nvidia-smi", "nothing: a CPU trains as well, only slower")
    # In a process of its own: TensorFlow takes 870 MB and the GPU's memory, and does not give them back.
    ask = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        usable = int(answer.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        usable = 0
    if usable < count:
        found = f"{count} found, TensorFlow sees {usable}"
        return Check(
            "GPU", "warning", found, "trainings run on the CPU; install TensorFlow's CUDA libraries and driver"
        )
    return Check("GPU", "ok", f"{count}, and TensorFlow sees them")


def check_docker() -> Check:
    """Checks for a Docker engine that answers."""
    advice = "nothing for 'make run'; needed for docker compose only"
    try:
        answer = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_ANSWER * 2,
            check=True,
        )
    except FileNotFoundError:
        return Check("Docker", "warning", "not installed", advice)
    except (OSError, subprocess.SubprocessError):
        return Check("Docker", "warning", "installed, but its engine does not answer", advice)
    return Check("Docker", "ok", f"engine {answer.stdout.strip()}")


def _find_existing_folder(path: Path) -> Path:
    """Returns the nearest folder that exists: the path or one above it."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
