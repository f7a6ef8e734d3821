"""Which pictures the demo source draws: BreakHis's slide folders and magnifications, in proportion to its inventory."""

import zlib
from dataclasses import dataclass

from ml.core.errors import ConfigError
from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPE_NAMES, ImageName, InventoryRow, label_of, read_inventory

MIN_PICTURES = len({(row.subtype, row.slide) for row in read_inventory()})
"""82: fewer pictures than slide folders would leave cases, and so whole classes, without any."""

MAX_PICTURES = sum(row.images for row in read_inventory())
"""7,909: as many as BreakHis has."""


@dataclass(frozen=True, slots=True)
class Picture(ImageName):
    """A picture that the demo source will draw: its name, and where it lies in the original tree of BreakHis."""

    @property
    def path(self) -> str:
        """The relative POSIX path, ``BreaKHis_v1/histology_slides/breast/…``."""
        letter = "B" if self.label == "benign" else "M"
        return (
            f"BreaKHis_v1/histology_slides/breast/{self.label}/SOB/{SUBTYPE_NAMES[self.subtype]}/"
            f"SOB_{letter}_{self.subtype}_{self.slide}/{self.magnification}X/{self}"
        )


def plan_pictures(images: int) -> list[Picture]:
    """Which pictures there will be: ``images`` spread over BreakHis's 328 slide folders x magnifications.

    In proportion to the inventory, by largest remainder; every slide folder has at least one. The two copies of slide
    14-13412 always have the same pictures, as in BreakHis.

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
    counts = _largest_remainder(rows, images)
    _fill_empty_folders(rows, counts, [row.images * images for row in rows])
    return [
        Picture(row.subtype, row.slide, row.magnification, seq, label_of(row.subtype))
        for row, count in zip(rows, counts, strict=True)
        for seq in range(1, count + 1)
    ]


def _largest_remainder(rows: tuple[InventoryRow, ...], images: int) -> list[int]:
    # Integer arithmetic: with floats, equal remainders would not compare equal.
    shares = [divmod(row.images * images, MAX_PICTURES) for row in rows]
    counts = [whole for whole, _ in shares]
    # The two copies of the duplicated slide have equal remainders and stand side by side in this order.
    order = sorted(range(len(rows)), key=lambda i: (-shares[i][1], rows[i].slide, rows[i].magnification))
    left = images - sum(counts)
    for i in order[:left]:
        counts[i] += 1
    if 0 < left < len(order) and _place(rows[order[left - 1]]) == _place(rows[order[left]]):
        counts[order[left - 1]] -= 1
        counts[next(i for i in order[left:] if rows[i].slide != DUPLICATED_SLIDE)] += 1
    return counts


def _fill_empty_folders(rows: tuple[InventoryRow, ...], counts: list[int], shares: list[int]) -> None:
    folders: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        folders.setdefault((row.subtype, row.slide), []).append(i)
    spare = 0
    for cells in [cells for cells in folders.values() if not any(counts[i] for i in cells)]:
        if not spare:
            # The folder that can best spare one gives it; both copies of the duplicated slide do.
            richest = max(folders.values(), key=lambda other: sum(counts[i] for i in other))
            giver = _place(rows[max(richest, key=lambda i: counts[i])])
            for i, row in enumerate(rows):
                if _place(row) == giver:
                    counts[i] -= 1
                    spare += 1
        # At a zoom that the slide's name picks: the folder's largest would be 100X for most.
        counts[cells[zlib.crc32(rows[cells[0]].slide.encode()) % len(cells)]] += 1
        spare -= 1
    if spare:
        single = [i for i, row in enumerate(rows) if row.slide != DUPLICATED_SLIDE]
        counts[max(single, key=lambda i: shares[i] - counts[i] * MAX_PICTURES)] += 1


def _place(row: InventoryRow) -> tuple[str, int]:
    return row.slide, row.magnification
