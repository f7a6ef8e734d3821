"""The tissue architecture of each subtype, and how much stain it takes up."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ml.data.sources.demo.nuclei import (
    DUCTAL,
    EPITHELIUM,
    FIBROBLAST,
    LOBULAR,
    LYMPHOCYTE,
    MUCINOUS,
    PAPILLARY,
    SPINDLE,
    NucleusKind,
)
from ml.data.sources.demo.textures import Floats, sample_fibres
from ml.data.sources.demo.tissue import Tissue


def _draw_background(tissue: Tissue, *, pink: float, blue: float, swirl: float, contrast: float = 1.0) -> float:
    """Draws stroma, fat and blood as in any breast; returns how much of the subtype's structure to draw (0..1)."""
    rng = tissue.rng
    tissue.stroma(pink * rng.uniform(0.85, 1.15), blue, swirl, contrast)
    if rng.random() < 0.10:
        tissue.fat(rng.uniform(0.05, 0.25))
    if rng.random() < 0.06:
        tissue.bleeding(rng.uniform(0.05, 0.2))
    # Some fields of a slide show little of the tumour.
    return float(rng.uniform(0.0, 0.3) if rng.random() < 0.07 else rng.uniform(0.5, 1.0))


def _blend_kinds(kind: NucleusKind, other: NucleusKind, share: float) -> NucleusKind:
    """Returns nuclei between ``kind`` (share 0 or below) and ``other`` (share 1)."""
    t = max(share, 0.0)
    return replace(
        kind,
        diameter=kind.diameter + t * (other.diameter - kind.diameter),
        spread=kind.spread + t * (other.spread - kind.spread),
        vesicular=kind.vesicular + t * (other.vesicular - kind.vesicular),
    )


def _draw_glands(tissue: Tissue, distance: Floats, kind: NucleusKind, wall: float, *, secretion: float) -> None:
    """Draws round glands: a wall of two cell layers around a lumen."""
    body = tissue.inside(distance)
    lumen = tissue.inside(distance + wall)
    tissue.fill(body, pink=0.46, blue=0.08)
    tissue.fill(lumen, pink=0.30 * secretion, blue=0.05 * secretion, white=1 - 0.9 * secretion, grain=40)
    tissue.lining(kind, 7.5, distance, (0.52 * wall,), 0.7)
    tissue.lining(replace(FIBROBLAST, diameter=4.6), 11.0, distance, (0.8,), 0.4, across=False)


def _draw_adenosis(tissue: Tissue) -> None:
    """Draws adenosis: crowded small acini in lobules, with small lumina, in pink sclerotic stroma."""
    amount = _draw_background(tissue, pink=0.60, blue=0.03, swirl=45)
    kind = _blend_kinds(EPITHELIUM, DUCTAL, 0.35 * tissue.case.atypia)
    lobule = tissue.inside(tissue.covering(tissue.noise(330), 0.2 + 0.55 * amount), 25)
    tissue.fill(0.6 * lobule, pink=0.52, blue=0.05, grain=25)
    tissue.room[:] = np.maximum(tissue.room, lobule)
    acini = tissue.blobs(50, (16, 24), lobule, jitter=0.14)
    _draw_glands(tissue, acini, kind, 11.0, secretion=float(tissue.rng.uniform(0, 0.7)))
    tissue.cells(LYMPHOCYTE, 17, 0.25 * lobule * tissue.room)
    tissue.fibroblasts(FIBROBLAST, 21)


def _draw_tubular_adenoma(tissue: Tissue) -> None:
    """Draws tubular adenoma: uniform open tubules back to back, with hardly any stroma."""
    amount = _draw_background(tissue, pink=0.34, blue=0.02, swirl=35, contrast=0.8)
    kind = _blend_kinds(replace(EPITHELIUM, diameter=7.6, elongation=1.5), DUCTAL, 0.35 * tissue.case.atypia)
    where = tissue.inside(tissue.covering(tissue.noise(700), 0.55 + 0.45 * amount), 20)
    tubules = tissue.blobs(68, (25, 33), 0.95 * where, jitter=0.12)
    _draw_glands(tissue, tubules, kind, 12.5, secretion=float(tissue.rng.uniform(0, 0.5)))
    tissue.fibroblasts(FIBROBLAST, 18)


def _draw_fibroadenoma(tissue: Tissue) -> None:
    """Draws fibroadenoma: pale, loose, evenly cellular stroma that presses the ducts into slits."""
    amount = _draw_background(tissue, pink=0.36, blue=0.03, swirl=85, contrast=0.9)
    kind = _blend_kinds(EPITHELIUM, DUCTAL, 0.35 * tissue.case.atypia)
    open_by = tissue.rng.uniform(1.5, 6.0)
    slits = np.abs(tissue.covering(tissue.noise(270), 0.5)) - 11 - open_by
    slits += np.clip(tissue.covering(tissue.noise(260), 0.35 + 0.5 * amount), 0, None)  # ducts end somewhere
    if tissue.rng.random() < 0.5:
        slits = np.minimum(slits, tissue.blobs(150, (20, 36), np.full(tissue.shape, 0.35 * amount, np.float32)))
    _draw_glands(tissue, slits, kind, 11.5, secretion=float(tissue.rng.uniform(0, 0.4)))
    tissue.fibroblasts(FIBROBLAST, 15, 0.85)


def _draw_phyllodes_tumor(tissue: Tissue) -> None:
    """Draws phyllodes tumour: broad leaves of crowded spindle cells that bulge into lined clefts."""
    amount = _draw_background(tissue, pink=0.66, blue=0.04, swirl=130, contrast=0.7)
    spindle = _blend_kinds(SPINDLE, DUCTAL, 0.35 * tissue.case.atypia)
    cleft = tissue.covering(tissue.noise(380) - 0.35 * np.abs(tissue.noise(150)), 0.04 + 0.2 * amount)
    _draw_glands(tissue, cleft, EPITHELIUM, 12.0, secretion=float(tissue.rng.uniform(0, 0.25)))
    tissue.fibroblasts(spindle, 11.5, 0.9)


def _draw_ductal_carcinoma(tissue: Tissue) -> None:
    """Draws ductal carcinoma: nests and sheets of large uneven nuclei in fibrous stroma, some holes, some necrosis."""
    amount = _draw_background(tissue, pink=0.38, blue=0.20, swirl=55)
    rng = tissue.rng
    kind = _blend_kinds(DUCTAL, EPITHELIUM, -0.55 * tissue.case.atypia)
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


def _draw_lobular_carcinoma(tissue: Tissue) -> None:
    """Draws lobular carcinoma: small even cells in single file between dense collagen fibres."""
    amount = _draw_background(tissue, pink=0.66, blue=0.40, swirl=70, contrast=1.25)
    kind = _blend_kinds(LOBULAR, DUCTAL, 0.35 * tissue.case.atypia)
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


def _draw_mucinous_carcinoma(tissue: Tissue) -> None:
    """Draws mucinous carcinoma: clusters of cells afloat in pale blue pools of mucin between thin septa."""
    amount = _draw_background(tissue, pink=0.42, blue=0.10, swirl=60)
    rng = tissue.rng
    kind = _blend_kinds(MUCINOUS, DUCTAL, 0.35 * tissue.case.atypia)
    septa = np.abs(tissue.covering(tissue.noise(420), rng.uniform(0.3, 0.7))) - rng.uniform(8, 30)
    pools = np.maximum(-septa, tissue.covering(tissue.noise(520), 0.35 + 0.65 * amount))
    wisps = (
        1
        + 0.45 * sample_fibres(0.6 * tissue.along, tissue.across, max(0.8, 0.7 * tissue.unit))
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


def _draw_papillary_carcinoma(tissue: Tissue) -> None:
    """Draws papillary carcinoma: branching fronds with a fibrous core, coated with tall dark nuclei, in empty space."""
    amount = _draw_background(tissue, pink=0.38, blue=0.12, swirl=40)
    rng = tissue.rng
    kind = _blend_kinds(PAPILLARY, EPITHELIUM, -0.4 * tissue.case.atypia)
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


# Factors of haematoxylin and eosin by subtype, beside the stain of the case. Real subtypes differ less; the difference
# here is visible even to an untrained backbone.
STAIN_UPTAKE: dict[str, tuple[float, float]] = {
    "A": (0.75, 1.45),
    "F": (0.85, 0.85),
    "PT": (1.20, 1.30),
    "TA": (0.75, 0.60),
    "DC": (1.25, 0.90),
    "LC": (1.30, 1.30),
    "MC": (0.80, 0.50),
    "PC": (1.15, 0.60),
}

ARCHITECTURES: dict[str, Callable[[Tissue], None]] = {
    "A": _draw_adenosis,
    "F": _draw_fibroadenoma,
    "PT": _draw_phyllodes_tumor,
    "TA": _draw_tubular_adenoma,
    "DC": _draw_ductal_carcinoma,
    "LC": _draw_lobular_carcinoma,
    "MC": _draw_mucinous_carcinoma,
    "PC": _draw_papillary_carcinoma,
}
