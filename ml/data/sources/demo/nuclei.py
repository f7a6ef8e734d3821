"""Kinds of nuclei of the demo source, and the drawing of their haematoxylin."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.data.sources.demo.cases import Case
from ml.data.sources.demo.textures import TILE_SIDE, Floats, chromatin_tile


@dataclass(frozen=True, slots=True)
class NucleusKind:
    """A kind of nucleus; lengths in micrometres."""

    diameter: float
    elongation: float = 1.2  # long axis over short axis
    spread: float = 0.08  # coefficient of variation of the diameter
    stain: float = 1.0
    vesicular: float = 0.2  # 0: solid, 1: pale inside with a dark rim
    nucleolus: float = 0.0  # chance of a dark dot
    ragged: float = 0.05  # how far the outline leaves the ellipse


EPITHELIUM = NucleusKind(7.2, 1.25, stain=0.9)
LYMPHOCYTE = NucleusKind(5.8, 1.05, 0.05, stain=1.35, vesicular=0.0)
FIBROBLAST = NucleusKind(5.8, 4.4, 0.20, stain=0.8, vesicular=0.1)
SPINDLE = NucleusKind(7.2, 3.2, 0.18, stain=0.85, vesicular=0.25)
DUCTAL = NucleusKind(10.2, 1.25, 0.22, stain=1.25, vesicular=0.5, nucleolus=0.6, ragged=0.12)
LOBULAR = NucleusKind(7.6, 1.1, 0.10, stain=1.25, vesicular=0.1)
MUCINOUS = NucleusKind(8.4, 1.15, 0.12, stain=1.05, vesicular=0.3)
PAPILLARY = NucleusKind(9.0, 1.7, 0.14, stain=1.2, vesicular=0.25, nucleolus=0.2)


def draw_nuclei(kind: NucleusKind, case: Case, pixel: float, kinds: int, rng: np.random.Generator) -> Floats:
    """Draws the haematoxylin of ``kinds`` nuclei: (kinds, side, side), the i-th's long axis at (i + 0.5) pi / kinds.

    Args:
        kind: the kind of nucleus.
        case: the case, whose nuclei have a size.
        pixel: micrometres per pixel.
        kinds: the number of nuclei.
        rng: draws how the nuclei vary.
    """
    column = (slice(None), None, None)

    def per_nucleus(values: NDArray[np.float64]) -> Floats:
        return values.astype(np.float32)[column]

    diameter = kind.diameter * case.size * np.exp(np.clip(rng.normal(0, kind.spread, kinds), -0.6, 0.6))
    stretch = np.sqrt(kind.elongation * np.exp(rng.normal(0, 0.08, kinds)))
    half = int(0.5 * float((diameter * stretch).max()) * 1.15 / pixel) + 2
    y, x = (axis[None] * np.float32(pixel) for axis in np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32))
    turn = (np.arange(kinds) + 0.5) * np.pi / kinds
    cos, sin = per_nucleus(np.cos(turn)), per_nucleus(np.sin(turn))
    along = (cos * x + sin * y) / per_nucleus(0.5 * diameter * stretch)
    across = (cos * y - sin * x) / per_nucleus(0.5 * diameter / stretch)
    r = np.sqrt(along * along + across * across)
    if kind.ragged and pixel < 1.0:
        bearing = np.arctan2(across, along)
        for lobes in (2, 3):
            r *= 1 + kind.ragged * np.cos(lobes * bearing + per_nucleus(rng.uniform(0, 2 * np.pi, kinds)))
    # The edge is one pixel soft, as a share of the short radius.
    soft = per_nucleus(np.maximum(pixel, 0.35) / (0.5 * diameter / stretch))
    shape = np.clip(0.5 + (1 - r) / soft, 0, 1)
    density = 1 - per_nucleus(kind.vesicular * rng.uniform(0.4, 1.0, kinds)) * np.clip(1.15 - r * r, 0, 1)
    if pixel < 0.5:
        side = r.shape[1]
        corners = rng.integers(0, TILE_SIDE - side, (kinds, 2))
        tile = chromatin_tile()
        density *= 1 + 0.16 * np.stack([tile[top : top + side, left : left + side] for top, left in corners])
    if kind.nucleolus and pixel < 1.0:
        place = rng.uniform(-0.3, 0.3, (2, kinds))
        spot = np.hypot(along - per_nucleus(place[0]), across - per_nucleus(place[1])) * per_nucleus(0.5 * diameter)
        has_one = per_nucleus((rng.random(kinds) < kind.nucleolus).astype(np.float64))
        density += 0.6 * has_one * np.clip((1.15 - spot) / 0.5, 0, 1)
    stain = per_nucleus(1.12 * kind.stain * np.exp(rng.normal(0, 0.12 + 0.6 * kind.spread, kinds)))
    drawn: Floats = (stain * shape * density).astype(np.float32)
    return drawn
