"""The plan of the demo source's pictures: their slide folders and magnifications, in proportion to BreakHis."""

import zlib
from dataclasses import dataclass

from ml.core.errors import ConfigError
from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPE_NAMES, ImageName, InventoryRow, label_of, read_inventory

MIN_PICTURES = len({(row.subtype, row.slide) for row in read_inventory()})
"""82: with fewer pictures than slide folders, cases and even whole classes would have none."""

MAX_PICTURES = sum(row.images for row in read_inventory())
"""7,909, the number of images of BreakHis."""


@dataclass(frozen=True, slots=True)
class PlannedPicture(ImageName):
    """A picture that the demo source draws: its name, and its path in the original tree of BreakHis."""

    @property
    def path(self) -> str:
        """The relative POSIX path, ``BreaKHis_v1/histology_slides/breast/…``."""
        letter = "B" if self.label == "benign" else "M"
        return (
            f"BreaKHis_v1/histology_slides/breast/{self.label}/SOB/{SUBTYPE_NAMES[self.subtype]}/"
            f"SOB_{letter}_{self.subtype}_{self.slide}/{self.magnification}X/{self}"
        )


def plan_pictures(images: int) -> list[PlannedPicture]:
    """Plans ``images`` pictures over BreakHis's 328 slide folders x magnifications.

    Their numbers are proportional to the inventory, by the largest remainder method; every slide folder has at least
    one picture. The two copies of slide 14-13412 always have the same pictures, as in BreakHis.

    Returns:
        the pictures, in the order of the inventory.

    Raises:
        ConfigError: ``images`` is below 82 or above 7,909.
    """
    if not MIN_PICTURES <= images <= MAX_PICTURES:
        raise ConfigError(
            f"the demo source draws {MIN_PICTURES} (one for each slide folder) to {MAX_PICTURES} (all of BreakHis) "
            "pictures, "
            f"not {images}: change 'images' in the source's YAML file"
        )
    rows = read_inventory()
    counts = _distribute(rows, images)
    _fill_empty_folders(rows, counts, [row.images * images for row in rows])
    return [
        PlannedPicture(row.subtype, row.slide, row.magnification, seq, label_of(row.subtype))
        for row, count in zip(rows, counts, strict=True)
        for seq in range(1, count + 1)
    ]


def _distribute(rows: tuple[InventoryRow, ...], images: int) -> list[int]:
    """Distributes ``images`` over the inventory's rows by the largest remainder method; returns the counts."""
    # Integer arithmetic: with floats, equal remainders might not compare equal.
    shares = [divmod(row.images * images, MAX_PICTURES) for row in rows]
    counts = [whole for whole, _ in shares]
    # The two copies of the duplicated slide have equal remainders, so they are neighbours in this order.
    order = sorted(range(len(rows)), key=lambda i: (-shares[i][1], rows[i].slide, rows[i].magnification))
    left = images - sum(counts)
    for i in order[:left]:
        counts[i] += 1
    if 0 < left < len(order) and _twin_key(rows[order[left - 1]]) == _twin_key(rows[order[left]]):
        counts[order[left - 1]] -= 1
        counts[next(i for i in order[left:] if rows[i].slide != DUPLICATED_SLIDE)] += 1
    return counts


def _fill_empty_folders(rows: tuple[InventoryRow, ...], counts: list[int], shares: list[int]) -> None:
    """Gives each empty slide folder one picture, taken from the largest folder; changes ``counts`` in place.

    ``shares`` are the exact counts times :data:`MAX_PICTURES`.
    """
    folders: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        folders.setdefault((row.subtype, row.slide), []).append(i)
    spare = 0
    for cells in [cells for cells in folders.values() if not any(counts[i] for i in cells)]:
        if not spare:
            # The largest folder gives one picture; if it is the duplicated slide, both copies give one.
            largest = max(folders.values(), key=lambda other: sum(counts[i] for i in other))
            donor = _twin_key(rows[max(largest, key=lambda i: counts[i])])
            for i, row in enumerate(rows):
                if _twin_key(row) == donor:
                    counts[i] -= 1
                    spare += 1
        # The slide's name selects the magnification: the one with most images would be 100X for most folders.
        counts[cells[zlib.crc32(rows[cells[0]].slide.encode()) % len(cells)]] += 1
        spare -= 1
    if spare:
        single = [i for i, row in enumerate(rows) if row.slide != DUPLICATED_SLIDE]
        counts[max(single, key=lambda i: shares[i] - counts[i] * MAX_PICTURES)] += 1


def _twin_key(row: InventoryRow) -> tuple[str, int]:
    """Returns the key that both copies of the duplicated slide share."""
    return row.slide, row.magnification
