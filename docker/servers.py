"""Commands of the servers in docker-compose.yaml besides their own. Settings come from the environment.

Usage: servers.py buckets | init | mlflow | migrate-mlflow | healthy URL [COMPONENT]
       servers.py save >ARCHIVE | load <ARCHIVE
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import urlopen

BUCKETS = ("breakhis", "mlflow")
_SECONDS_TO_ANSWER = 10
_SECONDS_FOR_S3 = 120
_BYTES_IN_MEMORY = 64 << 20


def buckets() -> None:
    """Makes the buckets that do not exist yet, once the S3 server answers."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    s3 = boto3.client("s3")
    deadline = time.monotonic() + _SECONDS_FOR_S3
    while True:
        try:
            existing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: {os.environ['AWS_ENDPOINT_URL']} does not answer: {error}")
            time.sleep(1)
    for name in BUCKETS:
        if name not in existing:
            s3.create_bucket(Bucket=name)
            print(f"made the bucket {name}")


def save() -> None:
    """Writes all objects of the buckets to standard output, as a tar archive of ``<bucket>/<key>``."""
    import boto3

    s3, count = boto3.client("s3"), 0
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for bucket in BUCKETS:
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for listed in page.get("Contents", []):
                    found = s3.get_object(Bucket=bucket, Key=listed["Key"])
                    entry = tarfile.TarInfo(f"{bucket}/{listed['Key']}")
                    entry.size, entry.mtime = found["ContentLength"], int(found["LastModified"].timestamp())
                    archive.addfile(entry, found["Body"])
                    count += 1
    print(f"saved {count} objects", file=sys.stderr)


def load() -> None:
    """Puts the objects of an archive that ``save`` wrote, from standard input, into the buckets if they are empty."""
    import boto3

    s3, count = boto3.client("s3"), 0
    for bucket in BUCKETS:
        if s3.list_objects_v2(Bucket=bucket, MaxKeys=1).get("KeyCount"):
            sys.exit(f"error: the bucket {bucket} is not empty; a backup is restored into an empty stack only")
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for entry in archive:
            bucket, _, key = entry.name.partition("/")
            data = archive.extractfile(entry)
            if bucket not in BUCKETS or not data:
                sys.exit(f"error: {entry.name!r} is not in a bucket of ours; is this a backup?")
            # An upload reads parts twice, which a stream does not allow.
            with tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY) as scratch:
                shutil.copyfileobj(data, scratch)
                scratch.seek(0)
                s3.upload_fileobj(scratch, bucket, key)
            count += 1
    print(f"loaded {count} objects", file=sys.stderr)


def init() -> None:
    """Brings Airflow's database up to date, and sets pools, connections, and the users of Airflow and MLflow."""
    from ml.core.settings import read_settings
    from ml.data.training_sets import registered_model_names
    from ml.local.accounts import SERVICE_USER
    from ml.local.mlflow_users import PROMOTER, TRAINER, set_up_mlflow_users

    env = os.environ
    _airflow("db", "migrate")
    slots = int(env.get("BREAKHIS_GPUS") or 0) or 2
    pools = {"gpu": (slots, "What computes at a time"), "promotion": (1, "Promotions change the registry one by one")}
    _import(
        "pools",
        {
            name: {"slots": size, "description": description, "include_deferred": False}
            for name, (size, description) in pools.items()
        },
    )
    store = {
        "conn_type": "aws",
        "login": "breakhis",
        "password": env["S3_SECRET"],
        "extra": {"endpoint_url": env["S3_ADDRESS"], "region_name": "us-east-1"},
    }
    mlflow = {"conn_type": "http", "host": "http://mlflow", "port": 5000}
    services = {TRAINER: env["MLFLOW_TRAINER_PASSWORD"], PROMOTER: env["MLFLOW_PROMOTER_PASSWORD"]}
    airflow = {"conn_type": "http", "host": "http://apiserver", "port": 8080, "login": SERVICE_USER}
    _import(
        "connections",
        {
            "breakhis_store": store,
            "breakhis_mlflow": {**mlflow, "login": TRAINER, "password": services[TRAINER]},
            "breakhis_mlflow_promoter": {**mlflow, "login": PROMOTER, "password": services[PROMOTER]},
            "breakhis_airflow": {**airflow, "password": env["SERVICE_PASSWORD"]},
            "breakhis_audit": {"conn_type": "generic", "password": env["AUDIT_KEY"]},
        },
        "--overwrite",
    )
    people = {name: env[f"{name.upper()}_PASSWORD"] for name in ("engineer", "reviewer", "viewer")}
    _set_up_airflow({**people, "admin": env["ADMIN_PASSWORD"], SERVICE_USER: env["SERVICE_PASSWORD"]})
    passwords = {**people, **services, "admin": env["MLFLOW_ADMIN_PASSWORD"]}
    set_up_mlflow_users("http://mlflow:5000", passwords, registered_model_names(read_settings()))
    print("users are set up")


def mlflow() -> NoReturn:
    """Becomes the MLflow server, with its users in a database of their own."""
    from ml.local.mlflow_users import auth_config_text

    database = _mlflow_database()
    _write("/tmp/users.ini", auth_config_text(f"{database}/mlflow_users"))  # noqa: S108
    # Secrets are in the environment: a command line can be read by every process on the machine.
    os.environ |= {
        "MLFLOW_AUTH_CONFIG_PATH": "/tmp/users.ini",  # noqa: S108
        "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ.pop("MLFLOW_ADMIN_PASSWORD"),
        "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
    }
    command = ["mlflow", "server", "--app-name", "basic-auth", "--host", "0.0.0.0", "--port", "5000"]  # noqa: S104
    command += ["--artifacts-destination", "s3://mlflow", "--serve-artifacts", "--workers", "2"]
    os.execvp("mlflow", [*command, "--allowed-hosts", os.environ["MLFLOW_ALLOWED_HOSTS"]])  # noqa: S606


def migrate_mlflow() -> None:
    """Brings MLflow's database up to date with this MLflow. It cannot be undone but by a backup."""
    from mlflow.db import commands

    # In this process: the address on a command line could be read by every process on the machine.
    commands.main(["upgrade", f"{_mlflow_database()}/mlflow"], standalone_mode=False)


def healthy(url: str, component: str = "") -> None:
    """Exits with 0 if the address answers and says that the component is healthy."""
    with urlopen(url, timeout=_SECONDS_TO_ANSWER) as answer:  # noqa: S310
        content = answer.read()
    if component and json.loads(content)[component]["status"] != "healthy":
        sys.exit(f"{component} is not healthy")


def _mlflow_database() -> str:
    """Returns the address of the database server, with user and password."""
    return f"postgresql+psycopg2://mlflow:{os.environ.pop('MLFLOW_DB_PASSWORD')}@postgres"


def _airflow(*arguments: str) -> None:
    print(f"airflow {arguments[0]} {arguments[1]}", flush=True)
    if subprocess.run(["airflow", *arguments], check=False).returncode:
        sys.exit(f"error: airflow {arguments[0]} {arguments[1]} failed; see above")


def _import(what: str, values: dict[str, Any], *options: str) -> None:
    file = f"/tmp/{what}.json"  # noqa: S108
    _write(file, json.dumps(values))
    _airflow(what, "import", *options, file)
    Path(file).unlink()


def _set_up_airflow(passwords: dict[str, str]) -> None:
    sys.path.insert(0, os.environ["AIRFLOW__CORE__PLUGINS_FOLDER"])
    from breakhis_airflow.fab import ADMIN, ENGINEER, REVIEWER, VIEWER, User, set_up_users

    roles = {"admin": ADMIN, "engineer": ENGINEER, "reviewer": REVIEWER}
    set_up_users({name: User(roles.get(name, VIEWER), password) for name, password in passwords.items()})


def _write(file: str, text: str) -> None:
    """Writes a file that only this user can read."""
    Path(file).unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)


if __name__ == "__main__":
    commands = {
        "buckets": buckets,
        "save": save,
        "load": load,
        "init": init,
        "mlflow": mlflow,
        "migrate-mlflow": migrate_mlflow,
        "healthy": healthy,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
