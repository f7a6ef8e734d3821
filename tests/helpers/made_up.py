"""Small made-up inputs that several tests share: images, folders of images, manifests and datasets."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ml.core.hashes import digest
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, SUBTYPES, ImageName, Task, class_names, label_of
from ml.data.manifest import MANIFEST_TYPES, TIE_COLUMNS


def png(seed: int = 0, size: tuple[int, int] = (70, 46), mode: str = "RGB") -> bytes:
    """Returns a small PNG file; another seed gives another image."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def name(subtype: str, slide: str, magnification: int = 40, seq: int = 1) -> str:
    """Returns the BreakHis file name of an image."""
    return str(ImageName(subtype, slide, magnification, seq, label_of(subtype)))


def manifest_rows(cases: dict[str, tuple[str, int]]) -> pd.DataFrame:
    """Returns manifest rows for ``{case: (subtype, number of images)}``."""
    rows = []
    for case, (subtype, images) in cases.items():
        for seq in range(1, images + 1):
            rows.append(
                {
                    "path": name(subtype, case, 100, seq),
                    "sha256": digest([case, seq, "file"]),
                    "pixel_sha256": digest([case, seq]),
                    "perceptual_hash": digest([case, seq, "looks"])[:16],
                    "source": "made",
                    "cohort": "breakhis",
                    "patient": case,
                    "slide": case,
                    "subtype": subtype,
                    "label": label_of(subtype),
                    "magnification": 100,
                    "seq": seq,
                    "width": 700,
                    "height": 460,
                }
            )
    return pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)


def create_dataset(
    store: Store,
    frame: pd.DataFrame,
    *,
    ledger: str = "made",
    set_name: str = "made",
    method: str = "allocator",
    group: str = "case",
    ties: pd.DataFrame | None = None,
    seed: int = 0,
) -> str:
    """Creates a dataset object, as ``assemble`` does, from manifest rows and rows of :func:`tie_row`."""
    if ties is None:
        ties = pd.DataFrame(columns=list(TIE_COLUMNS), dtype="str")
    frame = frame.sort_values("pixel_sha256", ignore_index=True)
    validation = store.create("validation", [set_name], {"passed": True})
    content = {"source": "made", "validation": validation, "images": len(frame)}
    version = store.create("version", content, content)
    meta = {
        "set": set_name,
        "images": len(frame),
        "cases": int(frame["patient"].nunique()),
        "sources": {"made": version},
        "ledger": ledger,
        "seed": seed,
        "split": {"method": method, "group": group},
        "ties": len(ties),
    }

    def fill(folder: Path) -> None:
        frame.to_parquet(folder / "dataset.parquet", index=False)
        ties.to_parquet(folder / "ties.parquet", index=False)

    payload = [meta, frame[["pixel_sha256", "patient", "slide"]].to_numpy().tolist(), ties.to_numpy().tolist()]
    return store.create("dataset", payload, meta, fill)


def tie_row(pixel_sha256: str, left_out: str, kept: str) -> pd.DataFrame:
    """Returns the row of a duplicate image that was published under the case ``left_out`` and kept under ``kept``."""
    row = [pixel_sha256, left_out, left_out, "other", "copy.png", kept, kept]
    return pd.DataFrame([row], columns=list(TIE_COLUMNS), dtype="str")


def every_class(cases_per_class: int = 3, images: int = 4) -> dict[str, tuple[str, int]]:
    """Returns cases for :func:`manifest_rows` such that each subtype has several."""
    return {
        f"14-{1000 * k + c}": (subtype, images) for k, subtype in enumerate(SUBTYPES) for c in range(cases_per_class)
    }


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Writes files (relative path -> content) below a folder and returns the folder."""
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def evidence(task: Task = "binary", **changes: Any) -> Json:
    """Returns the evidence of a version that passes its gates, with changes."""
    passing = {
        "id": "evidence-0123456789ab",
        "model": f"made-{task}",
        "version": 3,
        "task": task,
        "metrics": {"roc_auc": 0.9, "roc_auc_ovr": 0.9, "macro_f1": 0.8, "accuracy": 0.85},
        "weights": {"id": "weights-0", "kind": "imagenet"},
        "absent_classes": [],
        "sides": {side: {"images": 10, "cases": 2} for side in sorted(SIDES)},
        "dataset": "dataset-0",
        "split": "split-0",
        "sources": {"made": "version-0"},
        "validated": {"made": True},
        "artifacts": {"evaluation/report.html": "0", "evaluation/model_card.md": "1"},
        "per_class": {
            name: {"recall": 0.8, "precision": 0.7, "f1": 0.75, "support": 5.0} for name in sorted(class_names(task))
        },
    }
    return passing | changes
