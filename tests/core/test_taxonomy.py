import contextlib
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.taxonomy import (
    DUPLICATED_SLIDE,
    LABELS,
    MAGNIFICATIONS,
    SUBTYPE_NAMES,
    SUBTYPES,
    ImageName,
    case_of,
    class_names,
    detect_folder_layout,
    find_folder_contradiction,
    label_of,
    parse_name,
    read_inventory,
)

# Published counts, images at 40/100/200/400X (Spanhol et al. 2016; benign at 40X as the names say).
PUBLISHED = {
    "A": (114, 113, 111, 106),
    "F": (253, 260, 264, 237),
    "PT": (109, 121, 108, 115),
    "TA": (149, 150, 140, 130),
    "DC": (864, 903, 896, 788),
    "LC": (156, 170, 163, 137),
    "MC": (205, 222, 196, 169),
    "PC": (145, 142, 135, 138),
}
FOLDERS = {"A": 4, "F": 10, "PT": 3, "TA": 7, "DC": 38, "LC": 5, "MC": 9, "PC": 6}
CASES = {"A": 2, "F": 7, "PT": 3, "TA": 6, "DC": 38, "LC": 4, "MC": 7, "PC": 6}

slides = st.from_regex(r"[0-9]{2}-[0-9]{1,6}[A-Z]{0,3}", fullmatch=True)
names = st.builds(
    ImageName,
    subtype=st.sampled_from(SUBTYPES),
    slide=slides,
    magnification=st.sampled_from(MAGNIFICATIONS),
    seq=st.integers(0, 999),
    label=st.sampled_from(LABELS),
)


@given(names)
def test_a_name_parses_back_to_the_same_parts(name: ImageName) -> None:
    assert parse_name(str(name)) == name
    assert str(parse_name(str(name))) == str(name)


@given(st.text(max_size=50))
def test_any_text_is_a_name_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(parse_name(text)) == text


@given(names, st.data())
def test_a_name_with_an_extra_character_is_refused(name: ImageName, data: st.DataObject) -> None:
    text = str(name)
    at = data.draw(st.integers(0, len(text)))
    broken = text[:at] + data.draw(st.sampled_from("_é ./\n")) + text[at:]
    with pytest.raises(ValueError, match="is not a BreakHis name"):
        parse_name(broken)


def test_the_parts_of_a_name() -> None:
    name = parse_name("SOB_B_A-14-22549AB-40-001.png")
    assert name == ImageName(subtype="A", slide="14-22549AB", magnification=40, seq=1, label="benign")
    assert name.case == "14-22549"


def test_the_label_is_what_the_name_says_even_if_the_subtype_disagrees() -> None:
    assert parse_name("SOB_B_DC-14-2523-40-010.png").label == "benign"
    assert label_of("DC") == "malignant"


@pytest.mark.parametrize(
    "text",
    [
        "SOB_B_A-14-22549AB-40-001.PNG",
        "SOB_B_A-14-22549AB-50-001.png",
        "SOB_B_A-14-22549AB-40-1.png",
        "SOB_X_A-14-22549AB-40-001.png",
        "SOB_B_ZZ-14-22549AB-40-001.png",
        "SOB_B_A-14-22549ab-40-001.png",
        "SOB_B_A-١٤-22549-40-001.png",  # Arabic digits, which \d would take
        "SOB_B_A-14-22549AB-40-001.png\n",
        "a/SOB_B_A-14-22549AB-40-001.png",
        "",
    ],
)
def test_names_outside_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="is not a BreakHis name"):
        parse_name(text)


@given(slides)
def test_the_case_is_the_slide_without_letters(slide: str) -> None:
    case = case_of(slide)
    assert slide.startswith(case)
    assert slide[len(case) :].isalpha() or slide == case
    assert case_of(case) == case


@pytest.mark.parametrize("slide", ["", "22549AB", "14-AB", "14-22549ab", "14-22549AB-40"])
def test_an_invalid_slide_id_has_no_case(slide: str) -> None:
    with pytest.raises(ValueError, match="is not a BreakHis slide id"):
        case_of(slide)


def test_labels_of_subtypes() -> None:
    assert {s: label_of(s) for s in SUBTYPES} == {
        **dict.fromkeys(("A", "F", "PT", "TA"), "benign"),
        **dict.fromkeys(("DC", "LC", "MC", "PC"), "malignant"),
    }
    with pytest.raises(ValueError, match="'XX'"):
        label_of("XX")
    assert tuple(SUBTYPE_NAMES) == SUBTYPES
    assert (class_names("binary"), class_names("subtype")) == (LABELS, SUBTYPES)
    assert LABELS.index("malignant") == 1


def test_the_inventory_is_the_published_data_set() -> None:
    rows = read_inventory()
    counts: Counter[tuple[str, int]] = Counter()
    for row in rows:
        counts[row.subtype, row.magnification] += row.images
    assert {s: tuple(counts[s, m] for m in MAGNIFICATIONS) for s in SUBTYPES} == PUBLISHED
    assert len(rows) == 82 * 4
    assert [sum(counts[s, m] for s in SUBTYPES) for m in MAGNIFICATIONS] == [1995, 2081, 2013, 1820]
    totals = Counter({label: sum(r.images for r in rows if label_of(r.subtype) == label) for label in LABELS})
    assert totals == {"benign": 2480, "malignant": 5429}
    assert all(row.images > 0 for row in rows)


def test_slides_and_cases() -> None:
    rows = read_inventory()
    folders = {(row.subtype, row.slide) for row in rows}
    assert Counter(subtype for subtype, _ in folders) == FOLDERS
    assert Counter(subtype for subtype, _ in {(s, case_of(slide)) for s, slide in folders}) == CASES
    assert len({slide for _, slide in folders}) == 81
    assert len({case_of(slide) for _, slide in folders}) == 70
    copies = [
        {(r.magnification, r.images) for r in rows if (r.subtype, r.slide) == (s, DUPLICATED_SLIDE)} for s in SUBTYPES
    ]
    assert copies[SUBTYPES.index("DC")] == copies[SUBTYPES.index("LC")] != set()
    assert sum(count for _, count in copies[SUBTYPES.index("DC")]) == 123


@pytest.mark.real
def test_real_names_are_in_the_grammar_and_in_the_inventory() -> None:
    files = sorted(Path(os.environ["BREAKHIS_REAL_SAMPLE"]).rglob("*.png"))
    assert files, "no PNG below BREAKHIS_REAL_SAMPLE"
    cells = {(row.subtype, row.slide, row.magnification) for row in read_inventory()}
    for file in files:
        name = parse_name(file.name)
        assert str(name) == file.name
        assert name.label == label_of(name.subtype)
        assert (name.subtype, name.slide, name.magnification) in cells


@pytest.mark.parametrize(
    ("folders", "against"),
    [
        ("malignant/SOB/ductal_carcinoma/SOB_M_DC_14-2523/40X", None),
        ("BreaKHis_v1/classificacao_binaria/40X/malignant", None),
        ("somewhere", None),
        ("benign/malignant", None),
        ("malignant/benign", "the folder benign contradicts the name, whose label is malignant"),
        ("Adenosis", "the folder Adenosis contradicts the name, whose subtype is DC"),
        ("SOB_M_DC_14-2524/40X", "the folder SOB_M_DC_14-2524 contradicts the name, whose slide is DC 14-2523"),
        ("SOB_M_LC_14-2523", "the folder SOB_M_LC_14-2523 contradicts the name, whose slide is DC 14-2523"),
        ("100X", "the folder 100X contradicts the name, whose magnification is 40"),
    ],
)
def test_folders_that_contradict_a_name_are_found(folders: str, against: str | None) -> None:
    assert find_folder_contradiction(f"{folders}/SOB_M_DC-14-2523-40-001.png") == against


@pytest.mark.parametrize(
    ("folders", "tree"),
    [
        ("BreaKHis_v1/histology_slides/breast/malignant/SOB/ductal_carcinoma/SOB_M_DC_14-2523/40X", "original tree"),
        (
            "BreaKHis_v1/BreaKHis_v1/histology_slides/breast/malignant/SOB/ductal_carcinoma/SOB_M_DC_14-2523/40X",
            "ambarish mirror",
        ),
        ("d/dataset_cancer_v1/classificacao_binaria/40X/malignant", "waseemalastal mirror"),
        ("my/pictures", "folders of its own"),
    ],
)
def test_published_folder_layouts_are_detected(folders: str, tree: str) -> None:
    assert detect_folder_layout([f"{folders}/SOB_M_DC-14-2523-40-001.png"] * 2 + ["x.png"]) == tree
