"""Augmentation: deterministic views of an image for training. View 0 is the image itself, the only one that is scored.

Every other view depends on the resized image and the view alone: an image has the same view in any process and in any
batch, so the backbone's features of it can be cached.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.hashes import digest
from ml.core.store import Json
from ml.images.decoding import PREPROCESSING, Pixels

if TYPE_CHECKING:
    import pandas as pd

    from ml.images.augmentation_settings import Augmentation, Views

_IDENTITY_KEY: Json = {"view": "identity", **PREPROCESSING}
_VERSION = 1

_MAX_SHIFT = 0.2
"""Largest shift of a stain's optical density, at a jitter of 1; a well stained nucleus has about 1."""

# Optical densities in red, green and blue of hematoxylin, eosin and DAB: A. C. Ruifrok, D. A. Johnston,
# "Quantification of histochemical staining by color deconvolution", Anal Quant Cytol Histol 23(4), 2001.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_UNMIXING = np.linalg.inv(_STAINS)
_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)  # plus 1: black has a finite density


@dataclass(frozen=True)
class View:
    """One view of images; by default the images themselves."""

    number: int = 0
    augmentation: "Augmentation | None" = None

    @cached_property
    def key(self) -> Json:
        """Identifies the view in the name of a cache."""
        if self.augmentation is None:
            return _IDENTITY_KEY
        return {"of": _IDENTITY_KEY, "number": self.number, "version": _VERSION, **self.augmentation.model_dump()}

    def apply(self, pixels: Pixels, pixel_sha256: str) -> Pixels:
        """Returns this view of an image.

        Args:
            pixels: uint8 (224, 224, 3), resized.
            pixel_sha256: the image's hash, which seeds the random draws together with :attr:`key`.

        Returns:
            uint8 (224, 224, 3).
        """
        spec = self.augmentation
        if spec is None:
            return pixels
        seed = hashlib.sha256(f"{digest(self.key)} {pixel_sha256}".encode()).digest()[:16]
        rng = np.random.default_rng(int.from_bytes(seed))
        # All values are drawn in a fixed order, used or not. The seed depends on the whole augmentation by way of the
        # key, so a change of one strength changes the draws of all.
        mirrored, quarter_turns = rng.integers(0, 2, 2), rng.integers(0, 4)
        strength, shift = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3)
        brightness, contrast = rng.uniform(-1, 1, 2)
        if spec.flips:
            pixels = pixels[:: -1 if mirrored[0] else 1, :: -1 if mirrored[1] else 1]
        if spec.rotations:
            pixels = np.rot90(pixels, int(quarter_turns))
        if spec.hed:
            pixels = scale_stains(pixels, 1 + spec.hed * strength, _MAX_SHIFT * spec.hed * shift)
        if spec.brightness or spec.contrast:
            pixels = _adjust_exposure(pixels, 255 * spec.brightness * brightness, 1 + spec.contrast * contrast)
        return np.ascontiguousarray(pixels)


IDENTITY_VIEW = View()


def scale_stains(pixels: Pixels, strength: NDArray[np.float64], shift: NDArray[np.float64]) -> Pixels:
    """Returns an image with its stains (hematoxylin, eosin and the residual) made stronger or weaker.

    Optical densities are unmixed into stains, scaled and shifted, and mixed again: D. Tellez et al., "Quantifying the
    effects of data augmentation and stain color normalization …", Med Image Anal 58, 2019 (arXiv:1902.06543).

    Args:
        pixels: uint8 (height, width, 3).
        strength: (3,) factor of each stain.
        shift: (3,) optical density that is added to each stain.

    Returns:
        uint8 (height, width, 3).
    """
    unmix_scale_mix = (_UNMIXING @ np.diag(strength) @ _STAINS).astype(np.float32)
    density = _DENSITY[pixels] @ unmix_scale_mix
    density += (shift @ _STAINS).astype(np.float32)
    np.exp(np.negative(density, out=density), out=density)
    density *= 256
    density -= 0.5  # minus the 1 added in _DENSITY, plus 0.5 to round
    stained: Pixels = np.clip(density, 0, 255, out=density).astype(np.uint8)
    return stained


def _adjust_exposure(pixels: Pixels, brightness: float, contrast: float) -> Pixels:
    """Returns (value - mean) * contrast + mean + brightness, by a table of the 256 values."""
    mean = float(pixels.mean())
    table = (np.arange(256) - mean) * contrast + mean + brightness
    exposed: Pixels = np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels]
    return exposed


ViewPlan = list[tuple[View, NDArray[np.bool_]]]
"""Views, each with a mask of the rows of a dataset (images,) that it is made of."""


def plan_views(spec: "Views", rows: "pd.DataFrame", sides: NDArray[np.str_] | None) -> ViewPlan:
    """Returns the views that a recipe needs of a dataset's rows.

    Every row has view 0; rows of the train and validation sides also have the recipe's augmented views.

    Args:
        spec: the recipe's views.
        rows: the dataset, with ``patient`` and ``subtype``.
        sides: the side of each row (images,); None: every row may be trained on.
    """
    trainable = np.ones(len(rows), dtype=bool) if sides is None else np.isin(sides, ("train", "validation"))
    cases = rows[trainable].groupby("subtype")["patient"].nunique()
    rare = rows["subtype"].isin(set(cases.index[cases < spec.rare_below_cases])).to_numpy()
    counts = np.where(rare, spec.rare_count, spec.count)
    plan: ViewPlan = [(IDENTITY_VIEW, np.ones(len(rows), dtype=bool))]
    plan += [
        (View(number, spec.augmentation), trainable & (counts > number))
        for number in range(1, max(spec.count, spec.rare_count))
    ]
    return [(view, mask) for view, mask in plan if mask.any()]


def plan_shared_views(specs: "Sequence[Views]", rows: "pd.DataFrame", sides: NDArray[np.str_] | None) -> ViewPlan:
    """Returns the views that any of several recipes needs, each once; for the arguments see :func:`plan_views`."""
    masks: dict[View, NDArray[np.bool_]] = {}
    for spec in specs:
        for view, mask in plan_views(spec, rows, sides):
            masks[view] = masks[view] | mask if view in masks else mask
    return list(masks.items())
