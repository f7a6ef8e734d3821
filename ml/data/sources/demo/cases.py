"""Random properties of each case of the demo source: stain, section thickness, nuclei and camera."""

import zlib
from dataclasses import dataclass, replace

import numpy as np

from ml.core.taxonomy import case_of
from ml.data.sources.demo.textures import Floats


@dataclass(frozen=True, slots=True)
class Case:
    """Properties that all pictures of a case share: its stain, which varies a little by slide, nuclei and camera."""

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


def draw_case(seed: int, slide: str) -> Case:
    """Draws the case of a slide at random; the slides of a case differ a little in the strength of their stain."""
    rng = random_generator(seed, "case", case_of(slide))
    haematoxylin = np.array([0.65, 0.70, 0.29]) + rng.normal([-0.04, 0.0, 0.06], [0.03, 0.02, 0.03])
    # Ruifrok and Johnston's eosin is nearly pure magenta; old sections are yellower, towards brick red.
    eosin = np.array([0.07, 0.99, 0.11]) + np.array([0.09, 0, 0.28]) * rng.uniform(0.5, 1.2) + rng.normal(0, 0.02, 3)
    case = Case(
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
    slide_rng = random_generator(seed, "slide", slide)
    strength = np.exp(slide_rng.normal(0, 0.05, 2))
    return replace(case, stain=(case.stain[0] * float(strength[0]), case.stain[1] * float(strength[1])))


def random_generator(seed: int, *key: str | int) -> np.random.Generator:
    """Returns a random generator that depends only on the seed and the key."""
    # crc32, since hash() of a string differs between processes.
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in key)])
