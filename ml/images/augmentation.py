"""Views: the ways a picture is seen in training. View 0 is the picture as it is, which alone is ever scored.

Another view is made of the resized picture, and of nothing but it: the same picture has the same view whoever makes it,
in whatever batch, so what the backbone says of it can be cached.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json, digest
from ml.images.decoding import PREPROCESSING, Pixels

if TYPE_CHECKING:
    import pandas as pd

    from ml.images.augmentation_settings import Augmentation, Views

_AS_IT_IS: Json = {"view": "identity", **PREPROCESSING}
_VERSION = 1

_SHIFT = 0.2
"""Optical density that a stain is shifted by at most, at a jitter of 1; a well stained nucleus has about 1."""

# Optical densities in red, green and blue of hematoxylin, eosin and DAB: A. C. Ruifrok, D. A. Johnston,
# "Quantification of histochemical staining by color deconvolution", Anal Quant Cytol Histol 23(4), 2001.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_UNMIX = np.linalg.inv(_STAINS)
_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)  # one added: black is no infinite density


@dataclass(frozen=True)
class View:
    """One way of seeing pictures; by default as they are."""

    number: int = 0
    augmentation: "Augmentation | None" = None

    @cached_property
    def key(self) -> Json:
        """What names it in a cache."""
        if self.augmentation is None:
            return _AS_IT_IS
        return {"of": _AS_IT_IS, "number": self.number, "version": _VERSION, **self.augmentation.model_dump()}

    def apply(self, pixels: Pixels, pixel_sha256: str) -> Pixels:
        """A picture, seen in this way.

        Args:
            pixels: uint8 (224, 224, 3), resized.
            pixel_sha256: the picture's hash, which it is drawn by.

        Returns:
            uint8 (224, 224, 3).
        """
        spec = self.augmentation
        if spec is None:
            return pixels
        seed = hashlib.sha256(f"{digest(self.key)} {pixel_sha256}".encode()).digest()[:16]
        rng = np.random.default_rng(int.from_bytes(seed))
        # All are drawn, used or not, in one order. They hang on all of the augmentation, which is in the key: with
        # another strength of one thing the others are drawn anew, too.
        mirrored, turns = rng.integers(0, 2, 2), rng.integers(0, 4)
        strength, shift = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3)
        brightness, contrast = rng.uniform(-1, 1, 2)
        if spec.flips:
            pixels = pixels[:: -1 if mirrored[0] else 1, :: -1 if mirrored[1] else 1]
        if spec.rotations:
            pixels = np.rot90(pixels, int(turns))
        if spec.hed:
            pixels = scale_stains(pixels, 1 + spec.hed * strength, _SHIFT * spec.hed * shift)
        if spec.brightness or spec.contrast:
            pixels = _expose(pixels, 255 * spec.brightness * brightness, 1 + spec.contrast * contrast)
        return np.ascontiguousarray(pixels)


IDENTITY_VIEW = View()


def scale_stains(pixels: Pixels, strength: NDArray[np.float64], shift: NDArray[np.float64]) -> Pixels:
    """A picture as though hematoxylin, eosin and the rest had been stronger or weaker.

    Densities are unmixed into stains, scaled and shifted, and mixed again: D. Tellez et al., "Quantifying the effects
    of data augmentation and stain color normalization …", Med Image Anal 58, 2019 (arXiv:1902.06543).

    Args:
        pixels: uint8 (height, width, 3).
        strength: (3,) factor of each stain.
        shift: (3,) optical density that is added to each.
    """
    change = (_UNMIX @ np.diag(strength) @ _STAINS).astype(np.float32)
    density = _DENSITY[pixels] @ change
    density += (shift @ _STAINS).astype(np.float32)
    np.exp(np.negative(density, out=density), out=density)
    density *= 256
    density -= 0.5  # the one that was added, and a half to round
    stained: Pixels = np.clip(density, 0, 255, out=density).astype(np.uint8)
    return stained


def _expose(pixels: Pixels, brightness: float, contrast: float) -> Pixels:
    """By a table of the 256 values: (value - mean) * contrast + mean + brightness."""
    mean = float(pixels.mean())
    table = (np.arange(256) - mean) * contrast + mean + brightness
    exposed: Pixels = np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels]
    return exposed


ViewPlan = list[tuple[View, NDArray[np.bool_]]]
"""Views, and which rows of a dataset (images,) are seen in them."""


def plan_views(spec: "Views", rows: "pd.DataFrame", sides: NDArray[np.str_] | None) -> ViewPlan:
    """The views that a recipe wants of a dataset's rows: of what may be learnt from; of the rest the picture as it is.

    Args:
        spec: the recipe's.
        rows: the dataset, with ``patient`` and ``subtype``.
        sides: of each row; None: any row may be learnt from.
    """
    learnt = np.ones(len(rows), dtype=bool) if sides is None else np.isin(sides, ("train", "validation"))
    cases = rows[learnt].groupby("subtype")["patient"].nunique()
    rare = rows["subtype"].isin(set(cases.index[cases < spec.rare_below_cases])).to_numpy()
    wanted = np.where(rare, spec.rare_count, spec.count)
    plan: ViewPlan = [(IDENTITY_VIEW, np.ones(len(rows), dtype=bool))]
    plan += [
        (View(number, spec.augmentation), learnt & (wanted > number))
        for number in range(1, max(spec.count, spec.rare_count))
    ]
    return [(view, mask) for view, mask in plan if mask.any()]


def plan_shared_views(specs: "Sequence[Views]", rows: "pd.DataFrame", sides: NDArray[np.str_] | None) -> ViewPlan:
    """The views that any of several recipes wants, each once."""
    masks: dict[View, NDArray[np.bool_]] = {}
    for spec in specs:
        for view, mask in plan_views(spec, rows, sides):
            masks[view] = masks[view] | mask if view in masks else mask
    return list(masks.items())
