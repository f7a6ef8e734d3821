import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from kaggle_server import TOKEN, KaggleServer, serve
from s3_proxy import Proxy, serve_proxy

from ml.core.hashes import digest
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, load_source
from ml.data.sources.spec import S3_KEY_VARIABLES


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a home, a store and a configuration of this test's own."""
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    return Settings(home=tmp_path / "home", store=(tmp_path / "store").as_uri(), conf=tmp_path / "conf")


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store(settings.store)


@pytest.fixture
def declare(settings: Settings) -> Callable[..., SourceSpec]:
    """Write a source's YAML file and read it."""

    def write(name: str = "mine", **fields: Any) -> SourceSpec:
        path = settings.conf / "sources" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **fields}))
        return load_source(name, settings.conf)

    return write


@pytest.fixture
def kaggle_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    """The stand-in for Kaggle; this process uses it, with a valid token."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "kaggle"))
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import kaggle_env

    monkeypatch.setattr(KaggleApi, "config", str(tmp_path / "kaggle" / "kaggle.json"))  # else fixed at its import
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    with serve() as server:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
        yield server


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with two images and a text below images/; the source's key is in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in S3_KEY_VARIABLES:
        monkeypatch.setenv(name, "source")
    name = f"bucket-{digest(str(tmp_path))[:20]}"
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    made = boto3.resource(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    ).Bucket(name)
    for key, data in {"images/": b"", "images/a/1.png": b"one", "images/2.PNG": b"two", "images/t.txt": b"t"}.items():
        made.put_object(Key=key, Body=data)
    return made


@pytest.fixture
def s3_source(declare: Callable[..., SourceSpec], bucket: Any, s3_endpoint: str) -> Callable[..., SourceSpec]:
    """Declares an S3 source in the bucket."""
    return lambda **fields: declare(kind="s3", **{"bucket": bucket.name, "endpoint": s3_endpoint, **fields})


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy before the S3 server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_proxy(s3_endpoint) as server:
        yield server
