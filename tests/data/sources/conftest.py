import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kaggle_server import TOKEN, KaggleServer, serve

from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, load_source


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
