"""Sources of images, declared in YAML, and the stage that fetches them.

DAG files import this package at parse time, so its top imports only YAML and pydantic; the modules that read folders,
archives and Kaggle are imported when something is fetched.
"""

from typing import TYPE_CHECKING, Any

from ml.data.sources.spec import (
    PLACEHOLDER,
    SOURCE_KINDS,
    DemoSource,
    DirectorySource,
    HttpSource,
    KaggleSource,
    S3Source,
    SourceSpec,
    TableSpec,
    load_source,
    source_files,
    source_name,
)

if TYPE_CHECKING:
    from ml.core.settings import Settings
    from ml.core.store import Store

__all__ = [
    "PLACEHOLDER",
    "SOURCE_KINDS",
    "DemoSource",
    "DirectorySource",
    "HttpSource",
    "KaggleSource",
    "S3Source",
    "SourceSpec",
    "TableSpec",
    "fetch_source",
    "load_source",
    "source_files",
    "source_name",
]


def fetch_source(spec: SourceSpec, store: "Store", settings: "Settings") -> dict[str, Any]:
    """Fetches a source's files into the store as a raw version; see :func:`ml.data.sources.fetching.fetch`."""
    from ml.data.sources.fetching import fetch as fetch_files

    return fetch_files(spec, store, settings)
