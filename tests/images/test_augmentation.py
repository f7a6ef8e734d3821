import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.images.augmentation import (
    _DENSITY,
    _STAINS,
    _UNMIXING,
    IDENTITY_VIEW,
    View,
    plan_shared_views,
    plan_views,
    scale_stains,
)
from ml.images.augmentation_settings import Augmentation
from ml.training.presets import Views, load_preset

NOTHING = {"flips": False, "rotations": False, "hed": 0.0, "brightness": 0.0, "contrast": 0.0}


def augmentation(**changes) -> Augmentation:
    return Augmentation(**{**NOTHING, **changes})


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)


ALL = augmentation(flips=True, rotations=True, hed=0.05, brightness=0.1, contrast=0.1)


def test_view_0_is_the_image_and_its_cache_keeps_its_name():
    assert IDENTITY_VIEW.apply(picture(), "a") is not None
    assert np.array_equal(IDENTITY_VIEW.apply(picture(), "a"), picture())
    assert IDENTITY_VIEW.key == {"view": "identity", "size": 224, "resize": "pillow-reduce-bicubic", "version": 2}


def test_a_view_is_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np\n"
        "from ml.images.augmentation_settings import Augmentation\n"
        "from ml.images.augmentation import View\n"
        f"spec = Augmentation(**{ALL.model_dump()!r})\n"
        "pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)\n"
        "print(hashlib.sha256(View(2, spec).apply(pixels, 'abc').tobytes()).hexdigest())"
    )
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1
    assert len(digests.pop()) == 65


def test_each_view_of_each_image_has_its_own_draws():
    views = [View(n, ALL).apply(picture(), h).tobytes() for n in (1, 2) for h in ("a", "b")]
    assert len(set(views)) == 4
    other = augmentation(flips=True, rotations=True, hed=0.05, brightness=0.1, contrast=0.2)
    assert View(1, other).key != View(1, ALL).key != View(2, ALL).key


@given(st.text(max_size=8), st.integers(1, 9))
def test_flips_and_rotations_move_pixels_and_change_none(name, number):
    transformed = View(number, augmentation(flips=True, rotations=True)).apply(picture(), name)
    assert transformed.flags["C_CONTIGUOUS"]
    assert np.array_equal(np.sort(transformed.reshape(-1, 3), axis=0), np.sort(picture().reshape(-1, 3), axis=0))


def test_all_eight_orientations_occur():
    marked = np.zeros((224, 224, 3), np.uint8)
    marked[0, 1] = 255
    spec = augmentation(flips=True, rotations=True)
    orientations = {View(1, spec).apply(marked, str(k)).tobytes() for k in range(200)}
    assert len(orientations) == 8


@given(st.integers(1, 99), st.sampled_from(["hed", "brightness", "contrast"]))
def test_colours_change_a_little_and_never_wrap_around(number, what):
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[:112] = 255
    view = View(number, augmentation(**{what: 0.1})).apply(pixels, "x").astype(int)
    assert np.abs(view - pixels).max() <= 60


def test_scale_stains_agrees_with_the_formula_in_float64():
    """Against the formula in float64: unmix the optical density, scale and shift, mix again."""
    pixels, strength, shift = picture(), np.array([1.1, 0.9, 1.0]), np.array([0.02, -0.01, 0.0])
    density = -np.log((pixels.astype(float) + 1) / 256)
    mixed = ((density @ np.linalg.inv(_STAINS)) * strength + shift) @ _STAINS
    expected = np.clip(256 * np.exp(-mixed) - 1, 0, 255)
    assert np.abs(scale_stains(pixels, strength, shift) - expected).max() <= 1
    assert np.allclose(_STAINS @ _UNMIXING, np.eye(3))
    assert _DENSITY[255] == 0


def test_unscaled_stains_change_nothing():
    assert np.abs(scale_stains(picture(), np.ones(3), np.zeros(3)).astype(int) - picture()).max() <= 1


def rows(cases: dict[str, int]) -> pd.DataFrame:
    pairs = [(s, f"{s}{c}") for s, n in cases.items() for c in range(n) for _ in range(2)]
    return pd.DataFrame(pairs, columns=["subtype", "patient"])


def test_rare_subtypes_have_more_views_and_the_test_side_has_one():
    table = rows({"A": 2, "DC": 6})
    sides = np.where(table["patient"].isin(["A1", "DC5"]), "test", "train")
    spec = Views(count=2, rare_count=4, rare_below_cases=3, augmentation=ALL)
    plan = plan_views(spec, table, sides)
    assert [view.number for view, _ in plan] == [0, 1, 2, 3]
    assert [int(mask.sum()) for _, mask in plan] == [16, 12, 2, 2]
    assert not any(mask[sides == "test"].any() for _, mask in plan[1:])
    assert int(plan_views(spec, table, None)[1][1].sum()) == 16


def test_two_recipes_share_their_views():
    table = rows({"A": 2, "DC": 6})
    few = Views(count=2, rare_count=2, rare_below_cases=0, augmentation=ALL)
    more = Views(count=2, rare_count=3, rare_below_cases=3, augmentation=ALL)
    none = load_preset("paper").subtype.views
    plan = plan_shared_views([few, more, none], table, None)
    assert [(view.number, int(mask.sum())) for view, mask in plan] == [(0, 16), (1, 16), (2, 4)]


def test_views_without_an_augmentation_are_an_error():
    with pytest.raises(ValueError, match="more than one view needs an augmentation"):
        Views(count=2, rare_count=1, rare_below_cases=0, augmentation=None)
