"""Pictures of two patients that look the same: copies that were resized, saved anew, mirrored or turned.

Their pixels differ, so they are no copies to the manifest, and with two patients they may come on two sides of a split.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.messages import MAX_FAULT, list_items
from ml.core.progress import warn
from ml.data.sources.check_settings import NearDuplicates
from ml.images.file_facts import HASH_DIGITS

if TYPE_CHECKING:
    import pandas as pd

PAIRS_SHOWN = 20
"""Pairs that are told one by one; of the others the number."""

_PAIRS_LOGGED = 3


class NearCopy(NamedTuple):
    """Two pictures that look the same, by their positions, and the number of bits between their hashes."""

    first: int
    second: int
    bits: int


def find_near_copies(
    hashes: Sequence[str], patients: Sequence[str], distance: int, *, boundary: int | None = None
) -> tuple[int, list[NearCopy]]:
    """Finds the pictures of different patients that look the same, also where one is mirrored or turned.

    A picture has a perceptual hash for each orientation. Two look the same if the first hash of the earlier one and any
    of the later one's differ in ``distance`` bits or fewer. The time grows with the number of pairs that are compared.

    Args:
        hashes: of each picture, as :func:`ml.images.file_facts.perceptual_hashes` writes them; or the first alone, as
            earlier releases had it.
        patients: of each picture.
        distance: the greatest number of bits.
        boundary: compare only pictures before this position with those from it on; None: all with all.

    Returns:
        the number of pairs, and the first :data:`PAIRS_SHOWN` of them.
    """
    parsed = _parse_hashes(hashes)
    upright, oriented = parsed[:, 0], np.ascontiguousarray(parsed.T)
    numbers: dict[str, int] = {}
    who = np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)
    pairs, shown = 0, list[NearCopy]()
    for first in range(len(hashes) if boundary is None else boundary):
        start = first + 1 if boundary is None else boundary
        if start == len(hashes):
            break
        apart = np.bitwise_count(oriented[:, start:] ^ upright[first]).min(axis=0)
        found = np.flatnonzero((apart <= distance) & (who[start:] != who[first]))
        pairs += len(found)
        shown += [NearCopy(first, int(start + at), int(apart[at])) for at in found[: PAIRS_SHOWN - len(shown)]]
    return pairs, shown


def report_near_copies(rows: "pd.DataFrame", demanded: Mapping[str, NearDuplicates], file: Path) -> int:
    """Warns of pictures of two sources that look the same under two patients; returns the number of pairs.

    Patients and paths stand in the log alone, and not in the dataset, where an erased patient would be named for ever.

    Args:
        rows: the rows of the dataset.
        demanded: by source. Of two sources, the greater distance and the higher severity count.
        file: the training set's, for messages.

    Raises:
        DataError: there are such pictures, and a source has made that critical.
    """
    import pandas as pd

    total = 0
    for names in combinations(demanded, 2):
        parts = [part for name in names if len(part := rows[rows["source"] == name])]
        # A version of an early release has one hash a picture. It is compared with each orientation of the others'.
        parts.sort(key=lambda part: len(part["perceptual_hash"].iloc[0]))
        if len(parts) < 2:
            continue
        both = pd.concat(parts, ignore_index=True)
        looks, patients = both["perceptual_hash"].tolist(), both["patient"].tolist()
        distance = max(demanded[name].distance for name in names)
        pairs, shown = find_near_copies(looks, patients, distance, boundary=len(parts[0]))
        if not pairs:
            continue
        total += pairs
        examples = (
            " and ".join(
                f"{row['source']}: {row['path']} of {row['patient']}" for row in both.iloc[[*at]].to_dict("records")
            )
            for *at, _ in shown[:_PAIRS_LOGGED]
        )
        message = (
            f"{file}: {pairs:,} pair(s) of pictures of the sources {' and '.join(names)} look the same under two "
            f"patients; one has a wrong name, or both are one person: {list_items(examples, '; ', limit=MAX_FAULT)}"
        )
        if any(demanded[name].severity == "critical" for name in names):
            raise DataError(f"{message}; mend a source, or leave it out of the training set")
        warn(message)
    return total


def _parse_hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Returns hashes: uint64 (pictures, orientations). Where a picture has one alone, it stands for all."""
    orientations = max((len(text) for text in texts), default=HASH_DIGITS) // HASH_DIGITS
    starts = range(0, orientations * HASH_DIGITS, HASH_DIGITS)
    hashes = [[int(text[start : start + HASH_DIGITS] or text[:HASH_DIGITS], 16) for start in starts] for text in texts]
    return np.array(hashes, dtype=np.uint64).reshape(len(texts), orientations)
