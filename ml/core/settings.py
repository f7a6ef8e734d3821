"""Every setting of the system, typed. Each is read from the environment variable ``BREAKHIS_<NAME>``.

``breakhis config`` shows the settings with their values; it masks secrets.
"""

import json
import os
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ml.core.errors import ConfigError
from ml.core.messages import MAX_FAULT, cut_message
from ml.core.mlflow_files import database_uri
from ml.core.names import expand_home, resolve_links

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout that contains this package, dags/ and plugins/."""

SECRETS_FILE = "secrets.json"
"""Name of the file with the local stack's keys, in the home folder."""


class Settings(BaseSettings):
    """The settings, read from the environment. Call :func:`read_settings` rather than this."""

    model_config = SettingsConfigDict(env_prefix="BREAKHIS_", env_ignore_empty=True, extra="ignore", frozen=True)

    home: Path = Field(
        PROJECT / ".breakhis", description="Folder of the local stack: databases, logs, passwords, caches."
    )
    store: str = Field("", description="Root of the store, file:///… or s3://…; default: store/ in the home folder.")
    conf: Path = Field(
        PROJECT / "dags", description="Folder with sources/, training_sets/ and policies/, the YAML that users write."
    )
    training_sets: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description=f"Further training-set YAML files, separated by '{os.pathsep}'; each becomes a retrain DAG."
    )
    mlflow_uri: str = Field(
        "", description="MLflow tracking server; default: MLFLOW_TRACKING_URI, else mlflow.db in the home folder."
    )
    mlflow_ui: str = Field("", description="Address of MLflow's pages for links; default: the tracking server's.")
    weights: str = Field(
        "imagenet",
        description="Backbone weights: imagenet (Keras' file, downloaded), random, or a path or URI of a no-top .h5 or "
        ".keras file.",
    )
    backend: Literal["auto", "openvino", "tensorflow"] = Field(
        "auto", description="What runs the frozen backbone: auto takes TensorFlow on a GPU and OpenVINO on a CPU."
    )
    workers: int = Field(0, ge=0, description="Processes that decode and draw pictures; 0: one per core.")
    decoding_memory: int = Field(
        512,
        ge=16,
        description="MB of memory that decoding one picture may take, in each of these processes; a new picture whose "
        "header asks for more is quarantined.",
    )
    decoding_seconds: int = Field(
        120,
        ge=1,
        description="Seconds of a core that reading one picture may take; a new one that takes more is quarantined.",
    )
    archive_entries: int = Field(
        200_000, ge=1, description="Files and folders that a source's archive, folder or bucket may hold."
    )
    archive_size: int = Field(
        100_000, ge=1, description="MB that a source's archive may unpack to, whether its files are pictures or not."
    )
    table_rows: int = Field(
        500_000, ge=1, description="Rows that a source's table may have; a kilobyte of memory each."
    )
    gpus: int | None = Field(None, ge=0, description="GPUs for the gpu pool; default: as many as are found.")
    gpu_required: bool = Field(
        False, description="Fail at once where TensorFlow sees no GPU, rather than compute on the CPU."
    )
    place: Literal["process", "docker"] = Field(
        "process",
        description="Where Airflow runs weights, features and train: as processes beside its worker, or in containers.",
    )
    connections: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Airflow connections that every stage is given, separated by commas: breakhis_store, "
        "breakhis_mlflow.",
    )
    shards: int = Field(1, ge=1, le=64, description="Tasks that share the work of features, on as many workers.")
    docker_image: str = Field("breakhis-trainer:latest", description="Image of the containers.")
    docker_url: str = Field("", description="Docker engine; default: DOCKER_HOST, else this machine's socket.")
    docker_connection: str = Field("", description="Airflow connection of type docker, for a registry with a login.")
    docker_network: str = Field("", description="Docker network that the containers join; default: the engine's own.")
    docker_volumes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="What the containers mount, as NAME:/path or NAME:/path:ro, separated by commas."
    )
    docker_gpus: int = Field(0, ge=-1, description="GPUs a container gets; -1: all. With any, none trains on a CPU.")
    docker_memory: str = Field("", pattern=r"^(\d+[bkmg]?)?$", description="Memory a container may use, such as 8g.")
    docker_cpus: float = Field(0, ge=0, description="CPUs a container may use; 0: all.")
    docker_shm: str = Field("1g", pattern=r"^\d+[bkmg]?$", description="Shared memory of a container.")
    docker_store: str = Field("", description="The store's root as containers see it; default: as everything does.")
    docker_mlflow_uri: str = Field("", description="MLflow as containers see it; default: as everything does.")
    dag: str = Field("", description="The DAG that a stage runs in; Airflow's tasks say so themselves.")
    dag_run: str = Field("", description="And the run of it.")
    airflow_ui: str = Field("", description="Address of Airflow's pages for links; Airflow's tasks say so themselves.")
    reviewers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("reviewer",), min_length=1, description="Airflow users who may answer a review, separated by commas."
    )
    review_hours: float = Field(
        336, gt=0, description="A review that nobody has answered after so many hours is a rejection."
    )
    airflow_url: str = Field("", description="Airflow's API server, where promotion reads the reviewer's answer.")
    airflow_user: str = Field("", description="Service account that promotion reads Airflow's record with.")
    airflow_password: SecretStr = Field(SecretStr(""), description="Password of that service account.")
    audit_key: SecretStr = Field(
        SecretStr(""), description="Key of the audit log's codes; default: that of the local stack in the home folder."
    )

    @field_validator("training_sets", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("reviewers", "connections", "docker_volumes", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("home", "conf")
    @classmethod
    def _resolve_path(cls, value: Path) -> Path:
        return resolve_links(expand_home(value))

    @field_validator("store")
    @classmethod
    def _check_scheme(cls, value: str) -> str:
        if value and not value.startswith(("file:///", "s3://")):
            raise ValueError(f"{value!r} must begin with file:/// or s3://")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fill_defaults(self) -> Self:
        # The model is frozen for its users; these defaults depend on another field.
        if not self.store:
            object.__setattr__(self, "store", (self.home / "store").as_uri())
        if not self.mlflow_uri:
            uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(self.home)
            object.__setattr__(self, "mlflow_uri", uri)
        if not self.mlflow_ui and self.mlflow_uri.startswith("http"):
            # Pages and messages show this address, so a password in it is removed: only the client needs that.
            object.__setattr__(self, "mlflow_ui", re.sub(r"//[^/@]*@", "//", self.mlflow_uri))
        if not self.audit_key.get_secret_value():
            object.__setattr__(self, "audit_key", SecretStr(_read_audit_key(self.home / SECRETS_FILE)))
        return self

    @cached_property
    def cache(self) -> Path:
        """Folder for files that can be made again, such as compiled networks."""
        return self.home / "cache"

    @property
    def worker_count(self) -> int:
        """Number of processes that decode: the setting, or else the number of cores this process may use."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def decoding_bytes(self) -> int:
        """Bytes of memory that decoding one picture may take."""
        return self.decoding_memory * 1_000_000

    @property
    def archive_bytes(self) -> int:
        """Bytes that a source's archive may unpack to."""
        return self.archive_size * 1_000_000


def _read_audit_key(file: Path) -> str:
    """Returns the audit log's key from the local stack's secrets, or "" if this user cannot read them."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("audit", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_settings() -> Settings:
    """Reads the settings from the environment as it is now.

    Raises:
        ConfigError: a variable has an invalid value; the message names the variable.
    """
    names = {name for name in os.environ if name.upper().startswith("BREAKHIS_")} | {"MLFLOW_TRACKING_URI", "HOME"}
    return _read_cached(str(Path.cwd()), *((name, os.environ.get(name)) for name in sorted(names)))


@lru_cache(maxsize=8)
def _read_cached(*_: object) -> Settings:
    """Reads the settings again only if an argument has changed: a DAG file reads them once for each task."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"BREAKHIS_{str(e['loc'][0]).upper() if e['loc'] else ''}: {e['msg']}" for e in error.errors()]
        raise ConfigError("invalid setting: " + "; ".join(cut_message(line, MAX_FAULT) for line in lines)) from None
