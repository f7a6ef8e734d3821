"""All 7,909 pictures of BreakHis, drawn, in each of the trees that BreakHis comes in: every one reads alike.

Drawing takes minutes and 4.4 GB, so these tests are chosen by BREAKHIS_REPLICA, the folder that the drawing is kept in.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPE_NAMES, parse_name, read_inventory
from ml.data.manifest import make_manifest, read_manifest
from ml.data.sources import fetch_source, load_source
from ml.data.validation import validate_manifest
from tests.benchmarks.replica import MAX_PICTURES, Replica

pytestmark = [pytest.mark.replica, pytest.mark.timeout(1800)]

TOLD = ["name", "label", "subtype", "slide", "patient", "magnification", "seq", "pixel_sha256"]


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica.drawn(MAX_PICTURES, Path(os.environ["BREAKHIS_REPLICA"]).resolve())


@pytest.fixture(scope="module")
def store(replica: Replica) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="store-", dir=replica.folder.parent) as folder:
        yield Store(Path(folder).as_uri())


@pytest.fixture
def beside(replica: Replica) -> Iterator[Path]:
    """A folder on the replica's own disk, since hard links do not cross from one disk to another."""
    with tempfile.TemporaryDirectory(prefix="tree-", dir=replica.folder.parent) as folder:
        yield Path(folder)


def original(path: str) -> Iterator[str]:
    yield path


def ambarish(path: str) -> Iterator[str]:
    yield f"BreaKHis_v1/{path}"


def waseemalastal(path: str) -> Iterator[str]:
    """Without slide folders, and every picture twice: by label and by subtype."""
    base = path.rpartition("/")[2]
    name = parse_name(base)
    root = "dataset_cancer_v1/dataset_cancer_v1"
    yield f"{root}/classificacao_binaria/{name.magnification}X/{name.label}/{base}"
    yield f"{root}/classificacao_multiclasse/{name.magnification}X/{SUBTYPE_NAMES[name.subtype]}/{base}"


@pytest.mark.parametrize("layout", [original, ambarish, waseemalastal], ids=lambda layout: layout.__name__)
def test_every_tree_gives_the_whole_inventory(layout, replica: Replica, store: Store, beside: Path) -> None:
    copies = 0
    for file in sorted(replica.folder.rglob("*.png")):
        for path in layout(file.relative_to(replica.folder).as_posix()):
            (beside / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, beside / "tree" / path)
            copies += 1
    if layout is ambarish:
        (beside / "tree" / "Folds.csv").write_text("fold,mag,grp,filename\n")
    yaml = beside / f"{layout.__name__}.yaml"
    yaml.write_text(f"name: {layout.__name__}\nkind: directory\npath: ./tree\ninventory: true\n")
    spec = load_source(yaml, beside)
    settings = Settings(home=beside / "home", store=store.root)
    fetched = fetch_source(spec, store, settings)
    assert (fetched["files"], fetched["skipped"]) == (copies, 1 if layout is ambarish else 0)
    made = make_manifest(spec, store, settings.worker_count)
    rows = read_manifest(made["manifest"], store)
    quarantine = pd.read_parquet(store.file(made["manifest"], "quarantine.parquet"))

    # Slide 14-13412 is there as DC and as LC, with the same 123 pictures; nobody can say which is right.
    doubtful = sum(row.images for row in read_inventory() if row.slide == DUPLICATED_SLIDE)
    assert made["quarantined"] == {"slide_with_two_subtypes": doubtful}
    assert set(quarantine["slide"]) == {DUPLICATED_SLIDE}
    assert len(rows) + len(quarantine) == MAX_PICTURES
    assert made["duplicates"] == copies - MAX_PICTURES
    assert made["tree"] == {original: "original tree"}.get(layout, f"{layout.__name__} mirror")
    found = pd.concat([rows, quarantine], ignore_index=True).groupby(["subtype", "slide", "magnification"]).size()
    assert found.to_dict() == {(row.subtype, row.slide, row.magnification): row.images for row in read_inventory()}
    result = validate_manifest(made["manifest"], store)
    assert (result["passed"], result["failed"], result["errored"], result["warned"]) == (True, [], [], [])

    # The same names, labels, cases and pictures as in the other trees.
    told = rows.assign(name=rows["path"].str.rpartition("/")[2])[TOLD].sort_values("name", ignore_index=True)
    reference = store.path("first.parquet")
    assert isinstance(reference, Path)
    if not reference.exists():
        told.to_parquet(reference)
    pd.testing.assert_frame_equal(told, pd.read_parquet(reference))
