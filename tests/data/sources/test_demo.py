import io
import itertools
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ml.core.errors import ConfigError
from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPES, ImageName, label_of, parse_name, read_inventory
from ml.data.sources.demo import MAX_PICTURES, MIN_PICTURES, draw_files, draw_picture, plan_pictures


def cells(images: int) -> Counter[tuple[str, str, int]]:
    return Counter((p.subtype, p.slide, p.magnification) for p in plan_pictures(images))


# --- which pictures ------------------------------------------------------------------------------------------------


@settings(max_examples=40)  # a plan of thousands takes a while on a busy machine
@given(st.integers(MIN_PICTURES, MAX_PICTURES))
@example(MIN_PICTURES)
@example(381)  # the last remainder falls to one copy of the duplicated slide
@example(640)
def test_a_plan_of_any_size(images: int) -> None:
    names = plan_pictures(images)
    assert len(names) == len({p.path for p in names}) == images
    counts = cells(images)
    assert len({(subtype, slide) for subtype, slide, _ in counts}) == 82
    for row in read_inventory():
        planned = counts[row.subtype, row.slide, row.magnification]
        assert planned <= row.images
        if images >= 640:  # below, some folders have one picture that their share would not give them
            assert abs(planned - row.images * images / MAX_PICTURES) < 1.5
    # What BreakHis publishes under two labels is the same set of pictures under both.
    for magnification in (40, 100, 200, 400):
        assert counts["DC", DUPLICATED_SLIDE, magnification] == counts["LC", DUPLICATED_SLIDE, magnification]


def test_the_largest_plan_is_the_inventory() -> None:
    assert cells(MAX_PICTURES) == {(r.subtype, r.slide, r.magnification): r.images for r in read_inventory()}


def test_the_smallest_plan_has_each_slide_folder_once_and_every_zoom() -> None:
    counts = cells(MIN_PICTURES)
    assert set(counts.values()) == {1}
    assert {magnification for _, _, magnification in counts} == {40, 100, 200, 400}


def test_proportions_of_the_default_size() -> None:
    by_subtype = Counter(p.subtype for p in plan_pictures(640))
    for subtype in SUBTYPES:
        share = sum(r.images for r in read_inventory() if r.subtype == subtype) / MAX_PICTURES
        assert by_subtype[subtype] == pytest.approx(640 * share, abs=10)


@pytest.mark.parametrize("images", [-1, 0, MIN_PICTURES - 1, MAX_PICTURES + 1])
def test_a_size_that_cannot_be_drawn_is_a_config_error(images: int) -> None:
    with pytest.raises(ConfigError, match=rf"82 .* to 7909 .*not {images}: change 'images'"):
        plan_pictures(images)
    with pytest.raises(ConfigError):
        next(draw_files(images, 1, 1))


def test_names_and_folders_are_those_of_breakhis() -> None:
    for picture in plan_pictures(900):
        *folders, file = picture.path.split("/")
        name = parse_name(file)
        assert str(name) == str(picture)
        assert name.label == label_of(name.subtype)
        assert folders[-1] == f"{picture.magnification}X"
    paths = [p.path for p in plan_pictures(MAX_PICTURES)]
    tree = "BreaKHis_v1/histology_slides/breast/"
    assert tree + "benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png" in paths
    assert tree + "malignant/SOB/papillary_carcinoma/SOB_M_PC_15-190EF/400X/SOB_M_PC-15-190EF-400-015.png" in paths


# --- pictures ------------------------------------------------------------------------------------------------------


def name(subtype: str, slide: str, magnification: int = 100, seq: int = 1) -> ImageName:
    return ImageName(subtype, slide, magnification, seq, label_of(subtype))


@pytest.mark.parametrize("magnification", [40, 100, 200, 400])
@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_picture_of_each_kind(subtype: str, magnification: int) -> None:
    slide = next(r.slide for r in read_inventory() if r.subtype == subtype and r.slide != "14-12465")
    rgb = draw_picture(name(subtype, slide, magnification), seed=1)
    assert rgb.shape == (460, 700, 3)
    assert rgb.dtype == np.uint8
    red, green, blue = rgb.reshape(-1, 3).mean(axis=0)
    assert green < min(red, blue)  # haematoxylin and eosin both take green away
    assert 100 < rgb.mean() < 235
    assert rgb.std() > 10


def test_the_short_slide() -> None:
    assert draw_picture(name("PC", "14-12465"), 1).shape == (456, 700, 3)


def test_pixels_depend_on_seed_slide_magnification_and_seq() -> None:
    first = draw_picture(name("F", "14-9133"), 1)
    assert np.array_equal(first, draw_picture(name("F", "14-9133"), 1))
    others = [
        draw_picture(name("F", "14-9133"), 2),
        draw_picture(name("F", "14-25197"), 1),
        draw_picture(name("F", "14-9133", 200), 1),
        draw_picture(name("F", "14-9133", 100, 2), 1),
    ]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([first, *others], 2))


def test_the_duplicated_slide_has_the_same_pixels_under_both_labels() -> None:
    dc, lc = (
        [draw_picture(p, 5) for p in plan_pictures(640) if p.slide == DUPLICATED_SLIDE and p.subtype == subtype]
        for subtype in ("DC", "LC")
    )
    assert len(dc) == len(lc) > 0
    assert all(np.array_equal(a, b) for a, b in zip(dc, lc, strict=True))


def test_slides_of_a_case_share_their_stain() -> None:
    def tint(slide: str, subtype: str) -> float:
        rgb = np.mean(
            [draw_picture(name(subtype, slide, 40, seq), 1).reshape(-1, 3).mean(axis=0) for seq in (1, 2, 3)], axis=0
        )
        return float(rgb[0] - rgb[2])

    within = abs(tint("14-14134", "F") - tint("14-14134E", "F"))
    others = [tint(slide, "F") for slide in ("14-14134", "14-23222AB", "14-25197", "14-9133", "14-29960AB")]
    assert within < max(others) - min(others)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, bytes]]:
    return list(draw_files(MIN_PICTURES, 3, 1))


def test_the_files_are_the_pictures_in_the_order_of_the_plan(drawn: list[tuple[str, bytes]]) -> None:
    names = plan_pictures(MIN_PICTURES)
    assert [path for path, _ in drawn] == [p.path for p in names]
    for picture, (_, data) in list(zip(names, drawn, strict=True))[::9]:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(image), draw_picture(picture, 3))


def test_every_file_passes_a_strict_reader(drawn: list[tuple[str, bytes]]) -> None:
    for _, data in drawn[::9]:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # checks the checksum of each chunk


def test_worker_processes_change_nothing(drawn: list[tuple[str, bytes]]) -> None:
    assert list(draw_files(MIN_PICTURES, 3, 2)) == drawn


def test_no_two_pictures_are_alike_but_the_duplicated_slide(drawn: list[tuple[str, bytes]]) -> None:
    repeated = [data for data, count in Counter(data for _, data in drawn).items() if count > 1]
    paths = [path for path, data in drawn if data in repeated]
    assert len(paths) == 2
    assert all(DUPLICATED_SLIDE in path for path in paths)


def test_who_stops_reading_leaves_no_process_behind() -> None:
    before = set(multiprocessing.active_children())
    files = draw_files(MAX_PICTURES, 1, 2)
    next(files)
    assert len(set(multiprocessing.active_children()) - before) == 2
    files.close()  # type: ignore[attr-defined]
    assert set(multiprocessing.active_children()) <= before
