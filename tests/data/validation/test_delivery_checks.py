"""Checks of a delivery as a whole, and what the YAML of a source changes in its checks."""

from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import Keep, manifest_table, named_wrongly, quarantine_table, row, with_values
from PIL import Image

from ml.core.errors import ConfigError, Refused
from ml.core.store import Json, Store
from ml.data.source_versions import publish_manifest
from ml.data.validation import count_images_before, validate_manifest


def outcomes(result: Json, store: Store) -> dict[str, Json]:
    return {one["name"]: one for one in store.meta(result["validation"])["checks"]}


def test_a_small_class_is_a_warning_that_counts_images_and_cases(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    result = validate_manifest(keep(small, class_sizes={}), store)
    assert result["passed"]
    (warned,) = result["warned"]
    assert warned["observed"] == (
        "A: 4 images of 1 case; DC: 4 images of 1 case; PC: 4 images of 1 case (at least 20 images of 2 cases expected)"
    )


def test_a_class_that_is_demanded_and_missing_blocks(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    sizes = {"severity": "critical", "min_images": 1, "min_cases": 1, "subtypes": ["A", "LC"]}
    result = validate_manifest(keep(small, class_sizes=sizes), store)
    (failed,) = result["failed"]
    assert failed["observed"] == "LC: 0 images of 0 cases (at least 1 image of 1 case expected)"


@pytest.mark.parametrize(("aside", "passed"), [(1, True), (2, False)])
def test_much_in_quarantine_blocks(aside: int, passed: bool, small: pd.DataFrame, keep: Keep, store: Store) -> None:
    result = validate_manifest(keep(small, [named_wrongly(f"{n}.png") for n in range(aside)]), store)
    assert result["passed"] == passed
    rate = outcomes(result, store)["quarantine_rate"]
    assert rate["observed"] == f"{aside} of {12 + aside} files, {aside / (12 + aside):.1%} (at most 10.0%)"


def test_a_loosened_check_is_shown_and_a_change_of_it_makes_another_validation(
    small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    aside = [named_wrongly(f"{n}.png") for n in range(6)]
    result = validate_manifest(
        keep(small, aside, quarantine_rate={"limit": 0.5}, image_sizes={"severity": "critical"}), store
    )
    assert result["passed"]
    assert result["changes"] == [
        "image_sizes: severity critical instead of warning",
        "class_sizes: min_images 0 instead of 20",
        "class_sizes: min_cases 0 instead of 2",
        "quarantine_rate: limit 0.5 instead of 0.1",
    ]
    front = Path(result["docs"].removeprefix("file://")).read_text()
    assert "changed by made-up.yaml" in front
    assert all(change in front for change in result["changes"])
    assert "critical (changed)" in front
    assert not validate_manifest(keep(small, aside), store)["passed"]


def test_a_check_of_the_sources_own(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    more = {
        "name": "low_power",
        "severity": "critical",
        "sentence": "This clinic has a 40x objective only.",
        "expectation": "ExpectColumnValuesToBeInSet",
        "arguments": {"column": "magnification", "value_set": [40]},
    }
    result = validate_manifest(keep(small, more=[more]), store)
    (failed,) = result["failed"]
    assert (failed["name"], failed["unexpected"]) == ("low_power", 9)
    assert "low_power: added" in result["changes"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expectation": "ExpectWonders"}, "has no attribute 'ExpectWonders'"),
        ({"expectation": "ExpectColumnValuesToBeInSet", "arguments": {"colum": "x"}}, "column field required"),
    ],
)
def test_a_check_of_the_sources_own_that_cannot_be(
    wrong: Json, message: str, small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    more = {"name": "mine", "sentence": "Something of our own.", **wrong}
    with pytest.raises(ConfigError, match=f"made-up.yaml: validation: the check 'mine' cannot be made: .*{message}"):
        validate_manifest(keep(small, more=[more]), store)


def published(store: Store, manifest: str) -> str:
    publish_manifest(manifest, store)
    return manifest


def test_a_delivery_is_held_against_the_version_before(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    first = validate_manifest(published(store, keep(small)), store)
    assert outcomes(first, store)["images_lost"]["observed"] == "nothing was published before"
    less = validate_manifest(keep(small.iloc[1:]), store)
    (failed,) = less["failed"]
    assert failed["name"] == "images_lost"
    assert failed["observed"] == "gone: A 1 of 4 (at most 10% of a subtype)"
    with pytest.raises(Refused, match="has not passed"):
        publish_manifest(keep(small.iloc[1:]), store)
    allowed = keep(small.iloc[1:], images_lost={"limit": 0.25})
    assert publish_manifest(allowed, store)["diff"] == {"added": 0, "removed": 1, "relabelled": 0}


@given(fates=st.lists(st.sampled_from(["kept", "gone", "same file", "same path", "no file"]), min_size=40, max_size=40))
def test_an_image_in_quarantine_is_not_called_gone(fates: list[str]) -> None:
    before = pd.DataFrame(
        {
            "path": [f"{n}.png" for n in range(40)],
            "sha256": [f"file {n}" for n in range(40)],
            "pixel_sha256": [f"pixels {n}" for n in range(40)],
            "subtype": [("A", "DC")[n % 2] for n in range(40)],
        }
    )
    quarantine = pd.DataFrame(
        [
            {
                "path": f"elsewhere/{n}.png" if fate == "same file" else f"{n}.png",
                "sha256": f"file {n}" if fate == "same file" else "" if fate == "no file" else "spoilt",
                "reason": "missing_file" if fate == "no file" else "truncated",
            }
            for n, fate in enumerate(fates)
            if fate not in {"kept", "gone"}
        ],
        columns=["path", "sha256", "reason"],
    )
    now = before[[fate == "kept" for fate in fates]]
    counts = {
        subtype: [
            20,
            sum(fate != "kept" for fate in fates[start::2]),
            sum(fate in {"same file", "same path"} for fate in fates[start::2]),
        ]
        for start, subtype in enumerate(("A", "DC"))
    }
    assert count_images_before(before, now, quarantine) == counts


def test_the_report_tells_what_is_gone_from_what_is_in_quarantine(
    small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    published(store, keep(small))
    aside = [named_wrongly(path) for path in small["path"].iloc[[0, 4]]]
    less = validate_manifest(keep(small.drop(index=[0, 1, 4]), aside), store)
    [lost] = [check for check in less["failed"] if check["name"] == "images_lost"]
    assert lost["observed"] == "gone: A 1 of 4; in quarantine: A 1 of 4, DC 1 of 4 (at most 10% of a subtype)"


def test_a_version_is_not_held_against_itself(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    manifest = published(store, keep(small))
    assert (
        validate_manifest(manifest, store)["validation"]
        == validate_manifest(published(store, manifest), store)["validation"]
    )


def test_a_class_that_multiplies_is_a_warning(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    published(store, keep(small))
    more = [row("PC", "15-190EF", 40, seq) for seq in range(2, 8)]
    result = validate_manifest(keep(manifest_table([*small.to_dict("records"), *more])), store)  # type: ignore[list-item]
    assert result["passed"]
    (warned,) = result["warned"]
    assert warned["observed"] == "PC from 4 to 10 images (at most 100% more)"


def test_other_demands_on_the_same_images_make_no_new_version(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    first = publish_manifest(keep(small), store)
    again = publish_manifest(keep(small, quarantine_rate={"limit": 0.3}), store)
    assert not again["changed"]
    assert again["version"] == first["version"]


def test_pictures_that_look_the_same_under_two_patients_are_a_warning(
    small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    look = int(small.loc[0, "perceptual_hash"], 16)
    alike = with_values(small, 5, perceptual_hash=f"{look ^ 0b10011:016x}")  # another patient, three bits apart
    alike = with_values(alike, 1, perceptual_hash=f"{look ^ 1:016x}")  # the same patient: serial sections are alike
    result = validate_manifest(keep(alike), store)
    assert result["passed"]
    (warned,) = result["warned"]
    assert warned["unexpected"] == 2
    assert warned["rows"][0] == {
        "path": small.loc[0, "path"],
        "looks_like": small.loc[5, "path"],
        "patients": "14-22549 and 14-2523",
        "bits_apart": 3,
    }
    assert small.loc[5, "path"] in Path(result["docs"].removeprefix("file://")).read_text()
    assert not validate_manifest(keep(alike, near_duplicates={"distance": 1}), store)["warned"]


def test_a_copy_in_any_orientation_under_another_patient_is_a_warning(
    small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    from ml.data.sources.demo import draw_files
    from ml.images.decoding import decode
    from ml.images.file_facts import ORIENTATIONS, perceptual_hashes

    first, *others = (decode(data) for _, data in islice(draw_files(82, 1, 1), 4))
    image = Image.fromarray(first)
    copies = [image, *(image.transpose(Image.Transpose[name]) for name in ORIENTATIONS[1:])]
    # Four pictures of the first patient, then the copies of one of them under the other two.
    for at, pixels in enumerate([first, *others, *map(np.asarray, copies)]):
        small = with_values(small, at, perceptual_hash=perceptual_hashes(pixels))
    (warned,) = validate_manifest(keep(small), store)["warned"]
    pairs = [pair for pair in warned["rows"] if pair["path"] == small.loc[0, "path"]]
    assert [pair["looks_like"] for pair in pairs] == small.loc[4:11, "path"].tolist()
    assert {pair["path"] for pair in warned["rows"]}.isdisjoint(small.loc[1:3, "path"])


def test_images_before_counts_by_pixels(small: pd.DataFrame) -> None:
    renamed = small.assign(path="elsewhere/" + small["path"]).iloc[2:]
    nothing = quarantine_table([])
    assert count_images_before(small, renamed, nothing) == {"A": [4, 2, 0], "DC": [4, 0, 0], "PC": [4, 0, 0]}
    assert count_images_before(None, small, nothing) == {}
