"""Rows and tables of manifests and quarantines, made up without any picture."""

import hashlib
from collections.abc import Callable

import pandas as pd

from ml.core.taxonomy import ImageName, label_of
from ml.data.manifest import MANIFEST_TYPES, QUARANTINE_TYPES

Keep = Callable[..., str]
"""The fixture that puts a manifest into the store and returns its id."""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row(subtype: str, slide: str, magnification: int, seq: int) -> dict[str, object]:
    name = ImageName(subtype, slide, magnification, seq, label_of(subtype))
    path = f"{slide}/{magnification}X/{name}"
    return {
        "path": path,
        "sha256": sha("file" + path),
        "pixel_sha256": sha("pixels" + path),
        "perceptual_hash": sha("looks" + path)[:16],
        "source": "made-up",
        "cohort": "breakhis",
        "patient": name.case,
        "slide": slide,
        "subtype": subtype,
        "label": name.label,
        "magnification": magnification,
        "seq": seq,
        "width": 700,
        "height": 460,
    }


def manifest_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)


def quarantine_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(QUARANTINE_TYPES)).astype(QUARANTINE_TYPES)


def quarantined(image: dict[str, object], reason: str = "truncated", folder: str = "") -> dict[str, object]:
    """The quarantine row of an image; ``folder`` is put before its path."""
    kept = {column: image[column] for column in QUARANTINE_TYPES if column in image}
    return {**kept, "path": f"{folder}{image['path']}", "reason": reason, "detail": f"it is {reason}"}


def named_wrongly(path: str) -> dict[str, object]:
    return {"path": path, "sha256": sha(path), "source": "made-up", "reason": "name", "detail": "not a BreakHis name"}


def with_values(frame: pd.DataFrame, at: int, **values: object) -> pd.DataFrame:
    """Returns a copy of the frame with other values in one row."""
    frame = frame.copy()
    for column, value in values.items():
        frame.loc[at, column] = value
    return frame
