"""The demo source: pictures drawn procedurally, with the names, folders, slides, cases and proportions of BreakHis.

They let the whole workflow be tried without any data, and prove nothing about medicine. Each subtype has its own
architecture (a *recipe* below); each case has its own stain, section thickness, nuclear size and camera, shared by all
its slides; each magnification shows the same micrometres at its own scale. So a network has to learn texture, and a
case it has not seen is not trivially right.

A picture is built the way the stain works: amounts of haematoxylin and eosin per pixel, turned into light by
Beer-Lambert with the stain vectors of A. Ruifrok and D. Johnston, "Quantification of histochemical staining by color
deconvolution", Analytical and Quantitative Cytology and Histology 23(4), 2001.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.core.errors import ConfigError
from ml.core.taxonomy import (
    DUPLICATED_SLIDE,
    IMAGE_SIZES,
    SUBTYPE_NAMES,
    ImageName,
    InventoryRow,
    case_of,
    inventory,
    label_of,
)
from ml.core.workers import in_processes

Floats = NDArray[Any]  # float32, which NumPy's type hints lose at the first operator
Bytes = NDArray[np.uint8]

SMALLEST = len({(row.subtype, row.slide) for row in inventory()})
"""82: fewer pictures than slide folders would leave cases, and so whole classes, without any."""

LARGEST = sum(row.images for row in inventory())
"""7,909: as many as BreakHis has."""

DRAWING_VERSION = 4
"""Raised when the same number and seed would give other pictures, so that those drawn before are not taken for them."""

_SHORT_SLIDE = "14-12465"  # the one slide of BreakHis whose pictures are 456 pixels high


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


def plan(images: int) -> list[Picture]:
    """Which pictures there will be: ``images`` spread over BreakHis's 328 slide folders x magnifications.

    In proportion to the inventory, by largest remainder; every slide folder has at least one. The two copies of slide
    14-13412 always have the same pictures, as in BreakHis.

    Raises:
        ConfigError: ``images`` is below 82 or above 7,909.
    """
    if not SMALLEST <= images <= LARGEST:
        raise ConfigError(
            f"the demo source draws {SMALLEST} (one for each slide folder) to {LARGEST} (all of BreakHis) pictures, "
            f"not {images}: change 'images' in the source's YAML file"
        )
    rows = inventory()
    counts = _largest_remainder(rows, images)
    _fill_empty_folders(rows, counts, [row.images * images for row in rows])
    return [
        Picture(row.subtype, row.slide, row.magnification, seq, label_of(row.subtype))
        for row, count in zip(rows, counts, strict=True)
        for seq in range(1, count + 1)
    ]


def draw(name: ImageName, seed: int) -> Bytes:
    """Draw one picture: uint8 RGB, (460, 700, 3), or (456, 700, 3) for slide PC 14-12465.

    The same (seed, slide, magnification, seq) gives the same pixels, whatever class the picture is filed under: slide
    14-13412, which BreakHis publishes as DC and as LC, is drawn as LC for both.
    """
    subtype = "LC" if name.slide == DUPLICATED_SLIDE else name.subtype
    case = _draw_case(seed, name.slide)
    tint = _TINTS[subtype]
    case = replace(case, stain=(case.stain[0] * tint[0], case.stain[1] * tint[1]))
    tissue = _Tissue(case, name.magnification, _random(seed, "picture", name.slide, name.magnification, name.seq))
    _RECIPES[subtype](tissue)
    width, height = IMAGE_SIZES[name.slide == _SHORT_SLIDE]
    return tissue.photograph()[:height, :width]


def pictures(images: int, seed: int, workers: int) -> Iterator[tuple[str, bytes]]:
    """Draw ``images`` pictures in ``workers`` processes.

    Yields:
        (relative POSIX path, PNG file), in the order of :func:`plan`; only a few are held at a time.

    Raises:
        ConfigError: see :func:`plan`.
        TryAgain: a drawing process was killed, most likely for want of memory.
    """
    yield from in_processes(partial(_draw_file, seed=seed), plan(images), workers)


# --- which pictures ------------------------------------------------------------------------------------------------


def _largest_remainder(rows: tuple[InventoryRow, ...], images: int) -> list[int]:
    # Integer arithmetic: with floats, equal remainders would not compare equal.
    shares = [divmod(row.images * images, LARGEST) for row in rows]
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
        counts[max(single, key=lambda i: shares[i] - counts[i] * LARGEST)] += 1


def _place(row: InventoryRow) -> tuple[str, int]:
    return row.slide, row.magnification


# --- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """What all pictures of a case share, and its slides nearly: the staining bath, the section and the camera."""

    haematoxylin: Floats  # optical density of red, green, blue per unit of stain
    eosin: Floats
    stain: tuple[float, float]  # strength of haematoxylin and of eosin
    lamp: Floats  # red, green, blue of empty glass, 0..255
    blur: float  # pixels
    size: float  # of nuclei, 1 is usual
    crowding: float  # of nuclei, 1 is usual
    atypia: float  # -1..1: how far benign nuclei look malignant and the reverse
    fibre: float  # contrast of the stroma
    slit: float  # how much white shrinkage there is between fibres


def _draw_case(seed: int, slide: str) -> _Case:
    rng = _random(seed, "case", case_of(slide))
    haematoxylin = np.array([0.65, 0.70, 0.29]) + rng.normal([-0.04, 0.0, 0.06], [0.03, 0.02, 0.03])
    # Ruifrok and Johnston's eosin is nearly pure magenta; old sections are yellower, towards brick red.
    eosin = np.array([0.07, 0.99, 0.11]) + np.array([0.09, 0, 0.28]) * rng.uniform(0.5, 1.2) + rng.normal(0, 0.02, 3)
    case = _Case(
        haematoxylin=(haematoxylin / np.linalg.norm(haematoxylin)).astype(np.float32),
        eosin=(eosin / np.linalg.norm(eosin)).astype(np.float32),
        stain=(0.86 * float(np.exp(rng.normal(0, 0.10))), 0.80 * float(np.exp(rng.normal(0, 0.13)))),
        lamp=(rng.uniform(232, 247) + rng.normal(0, [2.5, 2, 2.5])).astype(np.float32),
        blur=float(rng.uniform(0.3, 0.9)),
        size=float(np.exp(rng.normal(0, 0.07))),
        crowding=float(np.exp(rng.normal(0, 0.10))),
        atypia=float(np.clip(rng.normal(0, 0.45), -1, 1)),
        fibre=float(rng.uniform(0.2, 0.5)),
        slit=float(rng.uniform(0.0, 0.8)),
    )
    slide_rng = _random(seed, "slide", slide)
    strength = np.exp(slide_rng.normal(0, 0.05, 2))
    return replace(case, stain=(case.stain[0] * float(strength[0]), case.stain[1] * float(strength[1])))


def _random(seed: int, *key: str | int) -> np.random.Generator:
    # crc32, since hash() of a text differs from one process to the next.
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in key)])


# --- tissue --------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = IMAGE_SIZES[0]
_PIXEL = {40: 1.75, 100: 0.70, 200: 0.35, 400: 0.175}  # micrometres; a nucleus of 8 um is 46 pixels wide at 400X
_COARSE = {40: 2, 100: 2, 200: 2, 400: 4}  # architecture is drawn at this fraction: optics hide the rest
_FINE = {40: 1, 100: 1, 200: 1, 400: 2}  # nuclei likewise


@dataclass(frozen=True, slots=True)
class _Cells:
    """A kind of nucleus. Lengths in micrometres."""

    diameter: float
    elongation: float = 1.2  # long axis over short axis
    spread: float = 0.08  # coefficient of variation of the diameter
    stain: float = 1.0
    vesicular: float = 0.2  # 0: solid, 1: pale inside with a dark rim
    nucleolus: float = 0.0  # chance of a dark dot
    ragged: float = 0.05  # how far the outline leaves the ellipse


EPITHELIUM = _Cells(7.2, 1.25, stain=0.9)
LYMPHOCYTE = _Cells(5.8, 1.05, 0.05, stain=1.35, vesicular=0.0)
FIBROBLAST = _Cells(5.8, 4.4, 0.20, stain=0.8, vesicular=0.1)
SPINDLE = _Cells(7.2, 3.2, 0.18, stain=0.85, vesicular=0.25)
DUCTAL = _Cells(10.2, 1.25, 0.22, stain=1.25, vesicular=0.5, nucleolus=0.6, ragged=0.12)
LOBULAR = _Cells(7.6, 1.1, 0.10, stain=1.25, vesicular=0.1)
MUCINOUS = _Cells(8.4, 1.15, 0.12, stain=1.05, vesicular=0.3)
PAPILLARY = _Cells(9.0, 1.7, 0.14, stain=1.2, vesicular=0.25, nucleolus=0.2)


@dataclass(slots=True)
class _Tissue:
    """A field of view under construction. Maps are coarse (see ``_COARSE``); distances and places in micrometres.

    ``distance`` maps are signed: negative inside a structure, positive outside.
    """

    case: _Case
    magnification: int
    rng: np.random.Generator
    shape: tuple[int, int] = field(init=False)
    unit: float = field(init=False)  # micrometres per coarse pixel
    pixel: float = field(init=False)  # micrometres per fine pixel, for nuclei
    size: tuple[float, float] = field(init=False)  # width and height of the field
    eosin: Floats = field(init=False)
    haematoxylin: Floats = field(init=False)
    white: Floats = field(init=False)  # 0 tissue .. 1 empty glass
    room: Floats = field(init=False)  # 0..1: where stromal nuclei may lie
    along: Floats = field(init=False)  # coordinates along and across the fibres
    across: Floats = field(init=False)
    nuclei: Floats = field(init=False)

    def __post_init__(self) -> None:
        coarse, fine = _COARSE[self.magnification], _FINE[self.magnification]
        self.shape = (_HEIGHT // coarse, _WIDTH // coarse)
        self.unit = _PIXEL[self.magnification] * coarse
        self.pixel = _PIXEL[self.magnification] * fine
        self.size = (_WIDTH * _PIXEL[self.magnification], _HEIGHT * _PIXEL[self.magnification])
        self.eosin = np.zeros(self.shape, np.float32)
        self.haematoxylin = np.zeros(self.shape, np.float32)
        self.white = np.zeros(self.shape, np.float32)
        self.room = np.ones(self.shape, np.float32)
        self.nuclei = np.zeros((_HEIGHT // fine, _WIDTH // fine), np.float32)

    # --- fields -----------------------------------------------------------------------------------------------

    def noise(self, wavelength: float) -> Floats:
        """Smooth noise of about unit spread."""
        width, height = (side / wavelength for side in self.size)
        grid = self.rng.standard_normal((int(height) + 4, int(width) + 4)).astype(np.float32)
        dx, dy = self.rng.uniform(1, 2, 2)
        return 1.5 * _resize(grid, self.shape, (dx, dy, dx + width, dy + height))

    def contour(self, values: Floats, level: float = 0.0) -> Floats:
        """The distance to where ``values`` crosses ``level``, to first order; negative above the level."""
        down, right = np.gradient(values, self.unit)
        steepness = np.sqrt(down * down + right * right)
        distance: Floats = (level - values) / (steepness + 0.25 * float(steepness.mean()))
        return distance

    def covering(self, values: Floats, share: float) -> Floats:
        """The distance to the part of the field, ``share`` of its area, where ``values`` are highest.

        By share rather than by a fixed level, since whoever took the pictures looked for the tumour at every zoom.
        """
        return self.contour(values, float(np.quantile(values[::4, ::4], 1 - share)))

    def blobs(self, spacing: float, radius: tuple[float, float], where: Floats, jitter: float = 0.2) -> Floats:
        """The distance to roundish blobs on a jittered lattice; ``where`` is the chance of each."""
        x, y = self.scatter(spacing, margin=radius[1], jitter=jitter)
        keep = self.rng.random(len(x)) < self.at(where, x, y)
        x, y = x[keep], y[keep]
        return self.stamp_blobs(x, y, radius)

    def stamp_blobs(self, x: Floats, y: Floats, radius: tuple[float, float]) -> Floats:
        """The distance to roundish blobs at given places."""
        far = 12.0
        canvas = np.full(self.shape, far, np.float32)
        if not len(x):
            return canvas
        kinds = min(len(x), 14)
        half = int((radius[1] * 1.35 + far) / self.unit) + 1
        dy, dx = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) * np.float32(self.unit)
        column = (slice(None), None, None)
        angle = np.arctan2(dy, dx)[None] - self.rng.uniform(0, 2 * np.pi, kinds).astype(np.float32)[column]
        r = self.rng.uniform(*radius, kinds).astype(np.float32)[column]
        oval = self.rng.uniform(0.04, 0.26, kinds).astype(np.float32)[column]
        wave = self.rng.uniform(0.0, 0.09, kinds).astype(np.float32)[column]
        outline = r * (1 + oval * np.cos(2 * angle) + wave * np.sin(3 * angle + r))
        bank = np.minimum(np.hypot(dx, dy)[None] - outline, far)
        which = np.arange(len(x)) % kinds
        _stamp(canvas, bank, which, x / self.unit, y / self.unit, np.minimum, far)
        return canvas

    # --- places -----------------------------------------------------------------------------------------------

    def scatter(self, spacing: float, margin: float = 8.0, jitter: float = 0.32) -> tuple[Floats, Floats]:
        """Places on a hexagonal lattice, jittered; ``margin`` reaches beyond the field."""
        row = spacing * 0.866
        columns = int((self.size[0] + 2 * margin) / spacing) + 2
        rows = int((self.size[1] + 2 * margin) / row) + 2
        y, x = np.mgrid[:rows, :columns].astype(np.float32)
        x = (x + 0.5 * (y % 2)) * spacing - margin - self.rng.uniform(0, spacing)
        y = y * row - margin - self.rng.uniform(0, row)
        push = (jitter * spacing * self.rng.standard_normal((2, rows, columns))).astype(np.float32)
        return (x + push[0]).ravel(), (y + push[1]).ravel()

    def at(self, values: Floats, x: Floats, y: Floats) -> Floats:
        """The value of a map at each place; the border continues outwards."""
        column = np.clip(x / self.unit, 0, self.shape[1] - 1).astype(np.intp)
        row = np.clip(y / self.unit, 0, self.shape[0] - 1).astype(np.intp)
        return values[row, column]

    # --- tissues, in the order they are laid down ---------------------------------------------------------------

    def stroma(self, pink: float, blue: float = 0.04, swirl: float = 60.0, contrast: float = 1.0) -> None:
        """Fibres over the whole field. ``pink`` is collagen, ``blue`` ground substance, ``swirl`` how they wander."""
        angle = self.rng.uniform(0, np.pi)
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32) * np.float32(self.unit)
        wander = swirl * self.noise(420)
        waves = 0.12 * swirl * self.noise(70)
        self.along = np.cos(angle) * x + np.sin(angle) * y + 0.5 * swirl * self.noise(300)
        self.across = -np.sin(angle) * x + np.cos(angle) * y + wander + waves
        fibres = _sample_fibres(self.along, self.across, max(1.3, 0.7 * self.unit))
        finest = max(0.5, 0.7 * self.unit)
        if self.unit < 1.8:
            fibres = 0.8 * fibres + 0.6 * _sample_fibres(self.along, self.across, finest)
        amount = contrast * self.case.fibre
        patches = 1 + 0.18 * self.noise(160)
        self.eosin = pink * patches * np.clip(1 + amount * fibres, 0.1, None)
        self.haematoxylin = blue * (1 + 0.5 * self.noise(110)) * np.clip(1 + 0.5 * amount * fibres, 0.2, None)
        split = self.case.slit * contrast
        self.white = np.clip((fibres - 2.3 + split) * 1.2, 0, 0.85) * (split > 0.05)

    def fill(
        self, inside: Floats, *, pink: float, blue: float, white: float = 0.0, mottle: float = 0.15, grain: float = 14.0
    ) -> None:
        """Replace what is there by cytoplasm, mucin, secretion or glass, where ``inside`` (0..1) says so."""
        texture = 1 + mottle * self.noise(grain)
        self.eosin += inside * (pink * texture - self.eosin)
        self.haematoxylin += inside * (blue * texture - self.haematoxylin)
        self.white += inside * (white - self.white)
        self.room *= 1 - inside

    def inside(self, distance: Floats, edge: float = 1.0) -> Floats:
        """0..1 across a boundary that is ``edge`` micrometres soft, at least a coarse pixel."""
        return np.clip(0.5 - distance / (2 * max(edge, 0.8 * self.unit)), 0, 1)

    def fat(self, share: float) -> None:
        """Fat cells: glass with a thin pink wall, over a patch of about ``share`` of the field."""
        where = self.inside(self.covering(self.noise(500), share), 20)
        cells = self.blobs(47, (20, 23), where, jitter=0.05)
        self.fill(self.inside(cells), pink=0.0, blue=0.0, white=1.0)

    def bleeding(self, share: float) -> None:
        """Red cells lying between the fibres."""
        where = self.inside(self.covering(self.noise(240), share), 10)
        cells = self.blobs(7.5, (2.6, 3.4), 0.85 * where)
        disc = self.inside(cells, 0.6) * (self.room > 0.5)
        self.eosin += disc * (1.15 - self.eosin)
        self.white *= 1 - disc

    def inflammation(self, share: float) -> None:
        """Lymphocytes in patches of stroma."""
        where = self.inside(self.covering(self.noise(220), share), 25)
        self.cells(LYMPHOCYTE, 8.5, 0.75 * where * self.room)

    # --- nuclei -------------------------------------------------------------------------------------------------

    def cells(self, kind: _Cells, spacing: float, where: Floats, *, direction: Floats | None = None) -> None:
        """Nuclei strewn with chance ``where``; ``direction`` is the angle of their long axis, default any."""
        x, y = self.scatter(spacing / self.case.crowding)
        keep = self.rng.random(len(x)) < self.at(where, x, y)
        self.stamp(kind, x[keep], y[keep], direction)

    def fibroblasts(self, kind: _Cells, spacing: float, amount: float = 0.8) -> None:
        """Spindle nuclei along the fibres, wherever stroma is left."""
        self.cells(kind, spacing, amount * self.room * (self.white < 0.4), direction=self.fibre_angle())

    def fibre_angle(self) -> Floats:
        """The direction of the fibres at each place."""
        down, right = np.gradient(self.across)
        angle: Floats = np.arctan2(right, -down)
        return angle

    def lining(
        self,
        kind: _Cells,
        spacing: float,
        distance: Floats,
        depths: tuple[float, ...],
        jitter: float,
        *,
        across: bool = True,
    ) -> None:
        """Nuclei in rows at given depths below the boundary of a structure, their long axis ``across`` or along it."""
        down, right = np.gradient(distance, self.unit)
        steep = np.maximum(np.hypot(down, right), 0.3)
        normal = np.arctan2(down, right)
        for depth in depths:
            x, y = self.scatter(spacing / self.case.crowding)
            off = self.at(distance, x, y) + depth
            near = np.abs(off) < 0.5 * spacing + self.unit
            x, y, off = x[near], y[near], off[near]
            steps = (off + jitter * self.rng.standard_normal(len(off))) / self.at(steep, x, y)
            angle = self.at(normal, x, y)
            self.stamp(
                kind, x - steps * np.cos(angle), y - steps * np.sin(angle), normal if across else normal + np.pi / 2
            )

    def stamp(self, kind: _Cells, x: Floats, y: Floats, direction: Floats | None = None) -> None:
        """Nuclei at given places."""
        if not len(x):
            return
        kinds = 36
        if direction is None:
            which = self.rng.integers(0, kinds, len(x))
        else:
            angle = self.at(direction, x, y) + 0.18 * self.rng.standard_normal(len(x))
            which = (np.floor(angle * (kinds / np.pi)).astype(np.intp)) % kinds
        bank = _draw_nuclei(kind, self.case, self.pixel, kinds, self.rng)
        _stamp(self.nuclei, bank, which, x / self.pixel, y / self.pixel, np.maximum, 0.0)

    # --- the picture ----------------------------------------------------------------------------------------------

    def photograph(self) -> Bytes:
        """Light through the section, a lens and a camera: uint8 (460, 700, 3)."""
        case = self.case
        full = (_HEIGHT, _WIDTH)
        tissue = 1 - np.clip(self.white, 0, 1)
        thickness = 1 + 0.08 * self.noise(900)
        nuclei = self.nuclei if self.nuclei.shape == full else _resize(self.nuclei, full)
        nuclei = _blur(nuclei, case.blur * (1.3 if self.magnification >= 200 else 0.8))
        cover = np.minimum(nuclei, 1)
        granular = 1 + 0.09 * self.rng.standard_normal(self.shape, np.float32)
        eosin = _resize(self.eosin * tissue * thickness * granular, full)
        haematoxylin = _resize(self.haematoxylin * tissue * thickness, full)
        # A nucleus lies in the cytoplasm, so most of the eosin there is displaced.
        eosin *= case.stain[1] * (1 - 0.45 * cover)
        haematoxylin *= 1 - cover
        haematoxylin += nuclei
        haematoxylin *= case.stain[0]
        y, x = np.ogrid[-1 : 1 : _HEIGHT * 1j, -1 : 1 : _WIDTH * 1j]
        dx, dy = self.rng.normal(0, 0.03, 2)
        light = (1 - 0.05 * (x * x + y * y) + dx * x + dy * y).astype(np.float32)
        light *= np.float32(np.exp(self.rng.normal(0, 0.03)))
        grain = _grain()
        top, left = self.rng.integers(0, grain.shape[0] - _HEIGHT), self.rng.integers(0, grain.shape[1] - _WIDTH)
        light *= grain[top : top + _HEIGHT, left : left + _WIDTH]
        rgb = np.empty((*full, 3), np.uint8)
        for channel in range(3):
            density = haematoxylin * case.haematoxylin[channel]
            density += eosin * case.eosin[channel]
            np.exp(-density, out=density)
            density *= light
            density *= case.lamp[channel]
            np.clip(density, 0, 255, out=density)
            rgb[..., channel] = density
        return rgb


# --- recipes: one subtype each ---------------------------------------------------------------------------------------


def _begin(tissue: _Tissue, *, pink: float, blue: float, swirl: float, contrast: float = 1.0) -> float:
    """Stroma, and what any breast may hold; returns how much of the subtype's own structure to draw (0..1)."""
    rng = tissue.rng
    tissue.stroma(pink * rng.uniform(0.85, 1.15), blue, swirl, contrast)
    if rng.random() < 0.10:
        tissue.fat(rng.uniform(0.05, 0.25))
    if rng.random() < 0.06:
        tissue.bleeding(rng.uniform(0.05, 0.2))
    # Some fields of a slide show little of the tumour.
    return float(rng.uniform(0.0, 0.3) if rng.random() < 0.07 else rng.uniform(0.5, 1.0))


def _between(kind: _Cells, other: _Cells, share: float) -> _Cells:
    """Nuclei that are ``kind`` but for a ``share`` (0..1; below 0 counts as 0) of ``other``."""
    t = max(share, 0.0)
    return replace(
        kind,
        diameter=kind.diameter + t * (other.diameter - kind.diameter),
        spread=kind.spread + t * (other.spread - kind.spread),
        vesicular=kind.vesicular + t * (other.vesicular - kind.vesicular),
    )


def _glands(tissue: _Tissue, distance: Floats, kind: _Cells, wall: float, *, secretion: float) -> None:
    """Round glands: a wall of two cell layers about a lumen."""
    body = tissue.inside(distance)
    lumen = tissue.inside(distance + wall)
    tissue.fill(body, pink=0.46, blue=0.08)
    tissue.fill(lumen, pink=0.30 * secretion, blue=0.05 * secretion, white=1 - 0.9 * secretion, grain=40)
    tissue.lining(kind, 7.5, distance, (0.52 * wall,), 0.7)
    tissue.lining(replace(FIBROBLAST, diameter=4.6), 11.0, distance, (0.8,), 0.4, across=False)


def _adenosis(tissue: _Tissue) -> None:
    """Adenosis: crowded small acini in lobules, with small lumina, in pink sclerotic stroma."""
    amount = _begin(tissue, pink=0.60, blue=0.03, swirl=45)
    kind = _between(EPITHELIUM, DUCTAL, 0.35 * tissue.case.atypia)
    lobule = tissue.inside(tissue.covering(tissue.noise(330), 0.2 + 0.55 * amount), 25)
    tissue.fill(0.6 * lobule, pink=0.52, blue=0.05, grain=25)
    tissue.room[:] = np.maximum(tissue.room, lobule)
    acini = tissue.blobs(50, (16, 24), lobule, jitter=0.14)
    _glands(tissue, acini, kind, 11.0, secretion=float(tissue.rng.uniform(0, 0.7)))
    tissue.cells(LYMPHOCYTE, 17, 0.25 * lobule * tissue.room)
    tissue.fibroblasts(FIBROBLAST, 21)


def _tubular_adenoma(tissue: _Tissue) -> None:
    """Tubular adenoma: uniform open tubules back to back, with hardly any stroma."""
    amount = _begin(tissue, pink=0.34, blue=0.02, swirl=35, contrast=0.8)
    kind = _between(replace(EPITHELIUM, diameter=7.6, elongation=1.5), DUCTAL, 0.35 * tissue.case.atypia)
    where = tissue.inside(tissue.covering(tissue.noise(700), 0.55 + 0.45 * amount), 20)
    tubules = tissue.blobs(68, (25, 33), 0.95 * where, jitter=0.12)
    _glands(tissue, tubules, kind, 12.5, secretion=float(tissue.rng.uniform(0, 0.5)))
    tissue.fibroblasts(FIBROBLAST, 18)


def _fibroadenoma(tissue: _Tissue) -> None:
    """Fibroadenoma: pale, loose, evenly cellular stroma that presses the ducts into slits."""
    amount = _begin(tissue, pink=0.36, blue=0.03, swirl=85, contrast=0.9)
    kind = _between(EPITHELIUM, DUCTAL, 0.35 * tissue.case.atypia)
    open_by = tissue.rng.uniform(1.5, 6.0)
    slits = np.abs(tissue.covering(tissue.noise(270), 0.5)) - 11 - open_by
    slits += np.clip(tissue.covering(tissue.noise(260), 0.35 + 0.5 * amount), 0, None)  # ducts end somewhere
    if tissue.rng.random() < 0.5:
        slits = np.minimum(slits, tissue.blobs(150, (20, 36), np.full(tissue.shape, 0.35 * amount, np.float32)))
    _glands(tissue, slits, kind, 11.5, secretion=float(tissue.rng.uniform(0, 0.4)))
    tissue.fibroblasts(FIBROBLAST, 15, 0.85)


def _phyllodes_tumor(tissue: _Tissue) -> None:
    """Phyllodes tumour: broad leaves of crowded spindle cells that bulge into lined clefts."""
    amount = _begin(tissue, pink=0.66, blue=0.04, swirl=130, contrast=0.7)
    spindle = _between(SPINDLE, DUCTAL, 0.35 * tissue.case.atypia)
    cleft = tissue.covering(tissue.noise(380) - 0.35 * np.abs(tissue.noise(150)), 0.04 + 0.2 * amount)
    _glands(tissue, cleft, EPITHELIUM, 12.0, secretion=float(tissue.rng.uniform(0, 0.25)))
    tissue.fibroblasts(spindle, 11.5, 0.9)


def _ductal_carcinoma(tissue: _Tissue) -> None:
    """Ductal carcinoma: nests and sheets of large uneven nuclei in fibrous stroma, some holes, some necrosis."""
    amount = _begin(tissue, pink=0.38, blue=0.20, swirl=55)
    rng = tissue.rng
    kind = _between(DUCTAL, EPITHELIUM, -0.55 * tissue.case.atypia)
    nests = tissue.noise(200) + 0.45 * tissue.noise(60)
    distance = tissue.covering(nests, 0.25 + 0.55 * amount)
    shrinkage = distance - np.clip(4 * tissue.noise(130), 0, None) * rng.uniform(0, 2)
    tissue.fill(tissue.inside(shrinkage, 2.0), pink=0.05, blue=0.02, white=0.85)
    body = tissue.inside(distance)
    tissue.fill(body, pink=0.32, blue=0.46, mottle=0.2)
    if rng.random() < 0.35:
        holes = tissue.blobs(62, (8, 19), 0.6 * tissue.inside(distance + 22, 3))
        tissue.fill(tissue.inside(holes), pink=0.1, blue=0.03, white=0.85)
        body *= 1 - tissue.inside(holes - 2)
    if rng.random() < 0.18:
        dead = tissue.inside(tissue.covering(tissue.noise(260), 0.12), 12) * body
        tissue.fill(dead, pink=0.75, blue=0.12, mottle=0.3, grain=6)
        body *= 1 - 0.85 * dead
    tissue.cells(kind, 12.2, 0.95 * body * (distance < -3))
    if rng.random() < 0.35:
        tissue.inflammation(rng.uniform(0.1, 0.3))
    tissue.fibroblasts(FIBROBLAST, 18)


def _lobular_carcinoma(tissue: _Tissue) -> None:
    """Lobular carcinoma: small even cells in single file between dense collagen fibres."""
    amount = _begin(tissue, pink=0.66, blue=0.40, swirl=70, contrast=1.25)
    kind = _between(LOBULAR, DUCTAL, 0.35 * tissue.case.atypia)
    x, y = tissue.scatter(8.8 / tissue.case.crowding, jitter=0.25)
    gap = float(tissue.rng.uniform(19, 27))
    down, right = np.gradient(tissue.across, tissue.unit)
    slope = np.maximum(down * down + right * right, 0.2)
    across = tissue.at(tissue.across, x, y)
    near = np.abs(across / gap - np.round(across / gap)) * gap < 4.4
    files = tissue.covering(tissue.noise(75) + 0.5 * tissue.noise(320), 0.3 + 0.5 * amount)
    keep = near & (tissue.at(files, x, y) < 0) & (tissue.at(tissue.room, x, y) > 0.5)
    x, y, across = x[keep], y[keep], across[keep]
    step = (np.round(across / gap) * gap - across) / tissue.at(slope, x, y)
    step += 0.9 * tissue.rng.standard_normal(len(x))
    x, y = x + step * tissue.at(right, x, y), y + step * tissue.at(down, x, y)
    rims = tissue.stamp_blobs(x, y, (5.2, 6.6))
    tissue.fill(0.85 * tissue.inside(rims), pink=0.32, blue=0.24)
    tissue.stamp(kind, x, y)
    if tissue.rng.random() < 0.25:
        tissue.inflammation(tissue.rng.uniform(0.05, 0.2))
    tissue.fibroblasts(FIBROBLAST, 22)


def _mucinous_carcinoma(tissue: _Tissue) -> None:
    """Mucinous carcinoma: clusters of cells afloat in pale blue pools of mucin between thin septa."""
    amount = _begin(tissue, pink=0.42, blue=0.10, swirl=60)
    rng = tissue.rng
    kind = _between(MUCINOUS, DUCTAL, 0.35 * tissue.case.atypia)
    septa = np.abs(tissue.covering(tissue.noise(420), rng.uniform(0.3, 0.7))) - rng.uniform(8, 30)
    pools = np.maximum(-septa, tissue.covering(tissue.noise(520), 0.35 + 0.65 * amount))
    wisps = (
        1
        + 0.45 * _sample_fibres(0.6 * tissue.along, tissue.across, max(0.8, 0.7 * tissue.unit))
        + 0.5 * tissue.noise(60)
    )
    pool = tissue.inside(pools, 3)
    tissue.fill(pool, pink=0.07, blue=0.0, mottle=0.3, grain=50)
    tissue.haematoxylin += pool * np.clip(0.17 * wisps, 0.02, 0.5)
    clusters = tissue.blobs(105, (22, 47), 0.8 * tissue.inside(pools + 12, 4))
    clusters = np.maximum(clusters, tissue.contour(tissue.noise(34), -1.3))
    tissue.fill(tissue.inside(clusters), pink=0.32, blue=0.34)
    tissue.cells(kind, 9.2, 0.95 * tissue.inside(clusters + 3.0))
    tissue.fibroblasts(FIBROBLAST, 19)


def _papillary_carcinoma(tissue: _Tissue) -> None:
    """Papillary carcinoma: branching fronds with a fibrous core, coated with tall dark nuclei, in empty space."""
    amount = _begin(tissue, pink=0.38, blue=0.12, swirl=40)
    rng = tissue.rng
    kind = _between(PAPILLARY, EPITHELIUM, -0.4 * tissue.case.atypia)
    coat = float(rng.uniform(17, 27))
    branches = np.abs(tissue.covering(tissue.noise(210) + 0.3 * tissue.noise(70), 0.5)) - coat - rng.uniform(3, 14)
    branches += 4 * tissue.noise(45) + 8 * tissue.noise(110)
    solid = tissue.covering(tissue.noise(480), 0.18 - 0.15 * amount)
    distance = np.minimum(branches, solid)
    tissue.fill(1 - tissue.inside(distance), pink=0.06, blue=0.02, white=0.94)
    shell = tissue.inside(distance) - tissue.inside(distance + coat)
    tissue.fill(shell, pink=0.32, blue=0.34)
    rows = tuple(float(depth) for depth in np.arange(5.0, coat - 1, 7.0))
    tissue.lining(kind, 7.4, distance, rows, 1.2)
    tissue.fibroblasts(FIBROBLAST, 14)


# How much haematoxylin and eosin each subtype takes up beside the staining of the case. Real tissue differs less; here
# it is what even an untrained backbone can see.
_TINTS: dict[str, tuple[float, float]] = {
    "A": (0.75, 1.45),
    "F": (0.85, 0.85),
    "PT": (1.20, 1.30),
    "TA": (0.75, 0.60),
    "DC": (1.25, 0.90),
    "LC": (1.30, 1.30),
    "MC": (0.80, 0.50),
    "PC": (1.15, 0.60),
}

_RECIPES: dict[str, Callable[[_Tissue], None]] = {
    "A": _adenosis,
    "F": _fibroadenoma,
    "PT": _phyllodes_tumor,
    "TA": _tubular_adenoma,
    "DC": _ductal_carcinoma,
    "LC": _lobular_carcinoma,
    "MC": _mucinous_carcinoma,
    "PC": _papillary_carcinoma,
}


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_file(name: Picture, seed: int) -> tuple[str, bytes]:
    return name.path, _png(draw(name, seed))


def _png(rgb: Bytes) -> bytes:
    """A PNG file. Half of Pillow's time, which goes into trying five filters on each row: here each row is filtered
    by the one above, and zlib does not look for repetitions, of which a noisy picture has none.
    """
    height, width, _ = rgb.shape
    rows = rgb.reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # "up"
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_HUFFMAN_ONLY)
    data = deflate.compress(filtered.tobytes()) + deflate.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _draw_nuclei(kind: _Cells, case: _Case, pixel: float, kinds: int, rng: np.random.Generator) -> Floats:
    """Haematoxylin of ``kinds`` nuclei (kinds, side, side), the long axis of the i-th at angle (i + 0.5) pi / kinds."""
    column = (slice(None), None, None)

    def each(values: NDArray[np.float64]) -> Floats:
        return values.astype(np.float32)[column]

    diameter = kind.diameter * case.size * np.exp(np.clip(rng.normal(0, kind.spread, kinds), -0.6, 0.6))
    stretch = np.sqrt(kind.elongation * np.exp(rng.normal(0, 0.08, kinds)))
    half = int(0.5 * float((diameter * stretch).max()) * 1.15 / pixel) + 2
    y, x = (axis[None] * np.float32(pixel) for axis in np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32))
    turn = (np.arange(kinds) + 0.5) * np.pi / kinds
    cos, sin = each(np.cos(turn)), each(np.sin(turn))
    along = (cos * x + sin * y) / each(0.5 * diameter * stretch)
    across = (cos * y - sin * x) / each(0.5 * diameter / stretch)
    r = np.sqrt(along * along + across * across)
    if kind.ragged and pixel < 1.0:
        bearing = np.arctan2(across, along)
        for lobes in (2, 3):
            r *= 1 + kind.ragged * np.cos(lobes * bearing + each(rng.uniform(0, 2 * np.pi, kinds)))
    # One pixel of softness, as a share of the short radius.
    soft = each(np.maximum(pixel, 0.35) / (0.5 * diameter / stretch))
    shape = np.clip(0.5 + (1 - r) / soft, 0, 1)
    density = 1 - each(kind.vesicular * rng.uniform(0.4, 1.0, kinds)) * np.clip(1.15 - r * r, 0, 1)
    if pixel < 0.5:
        side = r.shape[1]
        corners = rng.integers(0, _TILE - side, (kinds, 2))
        tile = _chromatin_tile()
        density *= 1 + 0.16 * np.stack([tile[top : top + side, left : left + side] for top, left in corners])
    if kind.nucleolus and pixel < 1.0:
        place = rng.uniform(-0.3, 0.3, (2, kinds))
        spot = np.hypot(along - each(place[0]), across - each(place[1])) * each(0.5 * diameter)
        has_one = each((rng.random(kinds) < kind.nucleolus).astype(np.float64))
        density += 0.6 * has_one * np.clip((1.15 - spot) / 0.5, 0, 1)
    stain = each(1.12 * kind.stain * np.exp(rng.normal(0, 0.12 + 0.6 * kind.spread, kinds)))
    drawn: Floats = (stain * shape * density).astype(np.float32)
    return drawn


def _stamp(
    canvas: Floats, bank: Floats, which: NDArray[np.intp], x: Floats, y: Floats, join: np.ufunc, neutral: float
) -> None:
    """Join ``bank[which[i]]``, centred on pixel (x[i], y[i]), to ``canvas`` in place, with np.minimum or np.maximum."""
    half = bank.shape[1] // 2
    height, width = canvas.shape
    column, row = np.round(x).astype(np.intp), np.round(y).astype(np.intp)
    near = (column > -half) & (column < width + half) & (row > -half) & (row < height + half)
    column, row, which = column[near], row[near], which[near]
    # A border that takes what sticks out, so that no stamp needs clipping.
    padded = np.full((height + 4 * half, width + 4 * half), neutral, np.float32)
    padded[2 * half : -2 * half, 2 * half : -2 * half] = canvas
    used = np.flatnonzero((bank != neutral).any(axis=0).ravel())
    down, right = np.divmod(used, bank.shape[2])
    offsets = (down + half) * padded.shape[1] + right + half
    corners = row * padded.shape[1] + column
    flat = padded.reshape(-1)
    values = bank.reshape(len(bank), -1)[:, used]
    join.at(flat, (corners[:, None] + offsets[None]).ravel(), values[which].ravel())
    canvas[:] = padded[2 * half : -2 * half, 2 * half : -2 * half]


def _resize(values: Floats, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Floats:
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.array(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box), np.float32)


def _blur(values: Floats, sigma: float) -> Floats:
    """Three taps either way: exact enough for a lens of about a pixel, and much faster than a true Gaussian."""
    side = np.float32(min(0.5 * sigma * sigma, 0.32))
    for axis in (0, 1):
        inner = np.swapaxes(values, 0, axis)
        blurred = (1 - 2 * side) * inner
        blurred[1:] += side * inner[:-1]
        blurred[:-1] += side * inner[1:]
        values = np.swapaxes(blurred, 0, axis)
    return values


_TILE = 512


@cache
def _fibre_tile() -> Floats:
    """Streaks along x, unit spread, periodic: white noise whose spectrum is narrow along x and wide along y."""
    rng = np.random.default_rng(1)
    frequency = np.fft.fftfreq(_TILE)
    along, across = frequency[None, :], frequency[:, None]
    filtered = np.exp(-0.5 * ((along * 130) ** 2 + (across * 9.0) ** 2)) * (np.abs(across) > 0.012)
    streaks = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_TILE, _TILE))) * filtered).real
    tile: Floats = (streaks / streaks.std()).astype(np.float32)
    return tile


def _sample_fibres(along: Floats, across: Floats, unit: float) -> Floats:
    """The fibre tile at coordinates in micrometres, a tile pixel being ``unit`` of them; linear between pixels."""
    tile = _fibre_tile().ravel()
    x, y = along * np.float32(1 / unit), across * np.float32(1 / unit)
    left, above = np.floor(x), np.floor(y)
    x -= left
    y -= above
    column, row = left.astype(np.int32), above.astype(np.int32)
    last = np.int32(_TILE - 1)  # the tile's side is a power of two
    near, far = column & last, (column + 1) & last
    here, below = (row & last) * _TILE, ((row + 1) & last) * _TILE
    top = tile[here + near]
    top += x * (tile[here + far] - top)
    bottom = tile[below + near]
    bottom += x * (tile[below + far] - bottom)
    top += y * (bottom - top)
    return top


@cache
def _chromatin_tile() -> Floats:
    """Clumps of 1.5 to 3 um at 0.35 um a pixel, unit spread, periodic."""
    rng = np.random.default_rng(3)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_TILE), np.fft.fftfreq(_TILE)))
    band = np.exp(-0.5 * ((frequency - 0.15) / 0.05) ** 2)
    clumps = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_TILE, _TILE))) * band).real
    tile: Floats = (clumps / clumps.std()).astype(np.float32)
    return tile


@cache
def _grain() -> Floats:
    """The camera's noise, as a factor on the light; each picture takes another window of it."""
    rng = np.random.default_rng(2)
    return (1 + 0.012 * rng.standard_normal((_HEIGHT + 301, _WIDTH + 301))).astype(np.float32)
