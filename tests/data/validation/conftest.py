"""Manifests made up for the checks: the whole published BreakHis by name, and a small part of it."""

from pathlib import Path

import pandas as pd
import pytest
from made_up import Keep, manifest_table, quarantine_table, row

from ml.core.hashes import digest
from ml.core.store import Store
from ml.core.taxonomy import read_inventory


@pytest.fixture(scope="session")
def whole() -> pd.DataFrame:
    """All 7,909 images of the published inventory."""
    return manifest_table(
        [row(i.subtype, i.slide, i.magnification, seq) for i in read_inventory() for seq in range(1, i.images + 1)]
    )


@pytest.fixture
def small() -> pd.DataFrame:
    """Twelve images of three slides, without fault."""
    slides = [("A", "14-22549AB"), ("DC", "14-2523"), ("PC", "15-190EF")]
    return manifest_table([row(subtype, slide, mag, 1) for subtype, slide in slides for mag in (40, 100, 200, 400)])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


@pytest.fixture
def keep(store: Store) -> Keep:
    """Put a manifest object into the store; returns its id. Its classes may be as small as they are."""

    def _keep(
        frame: pd.DataFrame,
        quarantine: list[dict[str, object]] | None = None,
        inventory: bool = False,
        **demands: object,
    ) -> str:
        table = quarantine_table(quarantine or [])
        demands = {"class_sizes": {"min_images": 0, "min_cases": 0}, **demands}

        def fill(folder: Path) -> None:
            frame.to_parquet(folder / "manifest.parquet", index=False)
            table.to_parquet(folder / "quarantine.parquet", index=False)

        content = frame.to_json(orient="split")
        payload = [content, table.to_json(orient="split"), inventory, demands]
        meta = {
            "source": "made-up",
            "raw": "raw-000000000000",
            "images": len(frame),
            "duplicates": 0,
            "quarantined": {str(reason): int(n) for reason, n in table["reason"].value_counts().items()},
            "inventory": inventory,
            "layout": "breakhis",
            "tree": "original tree",
            "trust": {},
            "validation": demands,
            "file": "made-up.yaml",
            "content": digest(content),
        }
        return store.create("manifest", payload, meta, fill)

    return _keep
