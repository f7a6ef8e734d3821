import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.errors import DataError
from ml.core.store import Store
from ml.core.taxonomy import SIDES, SUBTYPES
from ml.data import split_methods
from ml.data.ledger import Ledger, read_ledger
from ml.data.manifest import TIE_COLUMNS
from ml.data.splits import QUARANTINED, Split, extend_ledger, look_up_sides, read_split, split_dataset
from tests.data.ledger_helpers import make_hash, write_old_ledger
from tests.helpers import made_up


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path.as_uri())


# --- splits ----------------------------------------------------------------------------------------------------------


def test_split_reports_sides_and_is_the_same_again(store):
    oid = made_up.create_dataset(store, made_up.manifest_rows(made_up.every_class()))
    first = split_dataset(oid, store)
    assert split_dataset(oid, store) == first
    for what, total in (("images", 8 * 3 * 4), ("cases", 24), ("slides", 24)):
        assert sum(first[side][what] for side in SIDES) == total
        assert sum(sum(first[side][f"{what}_by_subtype"].values()) for side in SIDES) == total
    assert (first["method"], first["group"]) == ("allocator", "case")
    assert (first["not_estimable"], first["not_estimable_because"], first["quarantined"]) == ([], {}, {})
    assert set(read_split(first["split"], store).sides.values()) == set(SIDES)
    assert store.meta(first["split"])["not_estimable_because"] == {}


def test_new_data_leaves_old_cases_where_they_were(store):
    old = made_up.every_class()
    before = read_split(
        split_dataset(made_up.create_dataset(store, made_up.manifest_rows(old)), store)["split"], store
    ).sides
    new = {**old, "14-90001": ("PT", 5), "14-90002": ("DC", 5)}
    after = read_split(
        split_dataset(made_up.create_dataset(store, made_up.manifest_rows(new)), store)["split"], store
    ).sides
    assert {case: after[case] for case in before} == before
    assert set(after) - set(before) == {"14-90001", "14-90002"}


def without_a(cases):
    return {case: told for case, told in cases.items() if told[0] != "A"}


def test_a_class_of_one_case_is_trained_on_and_named(store):
    frame = made_up.manifest_rows({**without_a(made_up.every_class()), "14-8": ("A", 3)})
    report = split_dataset(made_up.create_dataset(store, frame), store)
    assert report["not_estimable"] == ["A"]
    assert report["not_estimable_because"] == {"A": "A has 1 case"}
    assert report["train"]["cases_by_subtype"]["A"] == 1


def test_why_a_class_cannot_be_estimated(store):
    others = without_a(made_up.every_class())

    def why(ledger, *frames, **more):
        for frame in frames:
            report = split_dataset(made_up.create_dataset(store, frame, ledger=ledger, **more), store)
        assert split_dataset(made_up.create_dataset(store, frame, ledger=ledger, **more), store) == report
        assert store.meta(report["split"])["not_estimable_because"] == report["not_estimable_because"]
        return report["not_estimable_because"].get("A")

    a = made_up.manifest_rows({**others, "14-8": ("A", 3), "14-9": ("A", 3)})
    write_old_ledger(store, {"14-8": "train", "14-9": "train"}, name="frozen")
    assert why("frozen", a) == "both cases of A are frozen in train"
    tied = made_up.tie_row(a[a["patient"] == "14-8"]["pixel_sha256"].iloc[0], "14-9", "14-8")
    assert why("tied", a, ties=tied) == "both cases of A are tied by pictures that they share, so they are all in train"
    slides = made_up.manifest_rows({**others, "14-8": ("A", 3)})
    assert why("slides", slides, group="slide") == "A has 1 slide"
    # The two cases of A are also the only ones of F and of PT, which train needs more than test needs A.
    shared = pd.concat([a, made_up.manifest_rows({"14-8": ("F", 4), "14-9": ("PT", 4)}).query("seq == 4")])
    shared = shared[~((shared["subtype"].isin(["F", "PT"])) & ~shared["patient"].isin(["14-8", "14-9"]))]
    assert why("shared", shared) == (
        "both cases of A are in train: with one in test another class would be missing in train or test"
    )


def test_too_few_cases(store):
    with pytest.raises(DataError, match=r"2 case\(s\); a split needs at least 3"):
        split_dataset(
            made_up.create_dataset(store, made_up.manifest_rows({"14-1": ("A", 2), "14-2": ("DC", 2)})), store
        )


def test_sides_of_refuses_unknown_cases_and_leaks():
    frame = made_up.manifest_rows({"14-1": ("A", 1), "14-2": ("DC", 1)})
    split = Split("case", {"14-1": "train", "14-2": "test"})
    assert look_up_sides(frame, split).tolist() == ["train", "test"]
    with pytest.raises(DataError, match="does not know case 14-2"):
        look_up_sides(frame, Split("case", {"14-1": "train"}))
    out = Split("case", {"14-1": "train"}, frozenset(frame["pixel_sha256"].tail(1)))
    assert look_up_sides(frame, out).tolist() == ["train", QUARANTINED]
    frame["pixel_sha256"] = "same"
    with pytest.raises(DataError, match="two sides"):
        look_up_sides(frame, split)


def test_a_split_of_old_is_read(store):
    """As splits were written before groups and quarantine were told."""
    old = store.create("split", ["old"], {"method": "allocator", "sides": {"14-1": "train"}})
    assert read_split(old, store) == Split("case", {"14-1": "train"})


# --- by slide, and sgkf ----------------------------------------------------------------------------------------------


def test_by_slide_the_slides_of_a_case_may_part(store):
    frame = made_up.manifest_rows(made_up.every_class(cases_per_class=4))
    frame["patient"] = [f"{slide[:-1]}x" for slide in frame["slide"]]  # four slides a case
    report = split_dataset(made_up.create_dataset(store, frame, group="slide"), store)
    assert set(read_split(report["split"], store).sides) == set(frame["slide"])
    assert sum(report[side]["slides"] for side in SIDES) == 32
    assert sum(report[side]["cases"] for side in SIDES) > 8
    assert report["not_estimable"] == []


def test_what_is_added_to_an_sgkf_ledger_is_put_around_it(store):
    first = made_up.every_class()
    before = split_dataset(made_up.create_dataset(store, made_up.manifest_rows(first), method="sgkf"), store)
    assert before["method"] == "sgkf"
    new = {f"14-9000{n}": ("A", 4) for n in range(4)}
    after = split_dataset(made_up.create_dataset(store, made_up.manifest_rows({**first, **new}), method="sgkf"), store)
    old = read_split(before["split"], store).sides
    sides = read_split(after["split"], store).sides
    assert {case: sides[case] for case in old} == old
    assert "A" not in after["not_estimable"]


def test_sgkf_says_so_where_it_left_a_class_out(store):
    cases = {**without_a(made_up.every_class(8)), "14-8": ("A", 3), "14-9": ("A", 3)}
    becauses = set()
    for seed in range(6):
        frame = made_up.manifest_rows(cases)
        dataset = made_up.create_dataset(store, frame, ledger=f"l{seed}", method="sgkf", seed=seed)
        becauses.add(split_dataset(dataset, store)["not_estimable_because"].get("A"))
    assert any(why and why.startswith("the method sgkf put both cases of A in") for why in becauses)


# --- ties ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(store):
    """A ledger with cases of which the sides are known, and a picture of each."""
    frame = made_up.manifest_rows({f"14-{n}": (SUBTYPES[n % 8], 2) for n in range(1, 10)})
    sides = {f"14-{n}": SIDES[n % 3] for n in range(1, 10)}  # 3, 6, 9: train; 1, 4, 7: validation; 2, 5, 8: test
    pixels = {case: part["pixel_sha256"].tolist() for case, part in frame.groupby("patient")}
    ledger = Ledger("made").append(sides, pixels, "dataset-0", 0)
    store.put_json("ledgers/made.json", ledger.to_json())
    return frame, pixels


def split_with(store, frame, ties=None):
    dataset = made_up.create_dataset(store, frame, ties=ties)
    report = split_dataset(dataset, store)
    assert split_dataset(dataset, store) == report
    split = read_split(report["split"], store)
    rows = frame.assign(side=look_up_sides(frame, split))
    quarantine = pd.read_parquet(store.file(report["split"], "quarantine.parquet"))
    assert set(quarantine["pixel_sha256"]) == set(rows[rows["side"] == QUARANTINED]["pixel_sha256"])
    assert report["quarantined"] == quarantine["reason"].value_counts().to_dict()
    return report, rows.groupby("patient")["side"].agg(lambda s: " ".join(sorted(set(s)))).to_dict(), quarantine


def test_new_cases_go_where_their_pictures_were_before(store, begun):
    frame, pixels = begun
    new = made_up.manifest_rows({"14-20": ("A", 3), "14-21": ("A", 3)})
    new.loc[0, "pixel_sha256"] = pixels["14-2"][0]  # published under another case since
    new.loc[3, "pixel_sha256"] = pixels["14-3"][0]
    kept = frame[~frame["pixel_sha256"].isin(new["pixel_sha256"])]
    report, sides, _ = split_with(store, pd.concat([kept, new]))
    assert (sides["14-20"], sides["14-21"]) == ("test", "train")
    assert report["quarantined"] == {}


def test_new_cases_tied_to_opposite_sides_are_quarantined_whole(store, begun):
    frame, pixels = begun
    new = made_up.manifest_rows({"14-20": ("A", 3), "14-21": ("A", 3), "14-22": ("A", 3)})
    # 20 is tied to test, 21 to train, and they to each other; 22 is only what it seems.
    ties = pd.concat(
        [
            made_up.tie_row(pixels["14-2"][0], "14-20", "14-2"),
            made_up.tie_row(pixels["14-3"][0], "14-21", "14-3"),
            made_up.tie_row(new["pixel_sha256"][1], "14-21", "14-20"),
        ]
    )
    report, sides, quarantine = split_with(store, pd.concat([frame, new]), ties)
    assert (sides["14-20"], sides["14-21"]) == (QUARANTINED, QUARANTINED)
    assert sides["14-22"] in SIDES
    assert report["quarantined"] == {"opposite_sides": 6}
    assert set(quarantine["detail"]) == {
        f"case 14-{n} shares pictures with 14-2 (test) and 14-3 (train)" for n in (20, 21)
    }
    ledger, _ = read_ledger("made", store)
    assert not {"14-20", "14-21"} & ledger.sides.keys()
    # The tie was a mistake that the source has mended: they can be used.
    report, sides, _ = split_with(store, pd.concat([frame, new]))
    assert report["quarantined"] == {}


def test_a_picture_that_frozen_cases_of_opposite_sides_have_both_is_quarantined(store, begun):
    frame, pixels = begun
    new = made_up.manifest_rows({"14-2": ("PT", 4)}).tail(2)
    new["pixel_sha256"] = [pixels["14-3"][0], make_hash("new")]
    ties = made_up.tie_row(make_hash("new"), "14-3", "14-2")
    rows = pd.concat([frame[frame["pixel_sha256"] != pixels["14-3"][0]], new])
    report, sides, quarantine = split_with(store, rows, ties)
    assert report["quarantined"] == {"same_picture": 2}
    assert sides["14-2"] == f"{QUARANTINED} test"
    assert set(quarantine["detail"]) == {"found in 14-2 (test) and 14-3 (train)"}
    ledger, _ = read_ledger("made", store)
    assert make_hash("new")[:16] not in ledger.images["14-2"]
    assert len(ledger.entries) == 1
    # What 14-3 had before it keeps: only what is new is offending.
    report, sides, _ = split_with(store, frame, made_up.tie_row(pixels["14-3"][0], "14-2", "14-3"))
    assert report["quarantined"] == {}
    assert sides["14-3"] == "train"


def test_new_cases_that_share_a_picture_lie_on_one_side(store):
    frame = made_up.manifest_rows(made_up.every_class(4))
    by_class = frame.drop_duplicates("patient").groupby("subtype")["patient"].agg(list)
    first = {case: part["pixel_sha256"].iloc[0] for case, part in frame.groupby("patient")}
    pairs = [(cases[0], cases[1]) for cases in by_class]
    # What was left out may have other pixels than what was kept (a smaller copy), or be of a case without a row.
    ties = [made_up.tie_row(first[a], b, a) for a, b in pairs[:4]] + [
        made_up.tie_row(make_hash(a), b, a) for a, b in pairs[4:-1]
    ]
    ties += [made_up.tie_row(first[case], "14-none", case) for case in pairs[-1]]
    report, sides, _ = split_with(store, frame, pd.concat(ties))
    assert all(sides[a] == sides[b] for a, b in pairs)
    assert report["not_estimable"] == []
    ledger, _ = read_ledger("made", store)
    a, b = pairs[0]
    assert first[a][:16] in ledger.images[a] & ledger.images[b]


def test_too_few_cases_are_left(store, begun):
    new = made_up.manifest_rows({"14-2": ("A", 2), "14-20": ("A", 2), "14-30": ("A", 2)})
    _, pixels = begun
    ties = pd.concat([made_up.tie_row(pixels[case][0], "14-20", case) for case in ("14-2", "14-3")])
    with pytest.raises(DataError, match=r"2 case\(s\) \(2 images are quarantined\); a split needs at least 3"):
        split_with(store, new, ties)


# --- whatever comes --------------------------------------------------------------------------------------------------


def delivery(rng, number):
    """A dataset of a few cases, old and new, and of pictures, some of which other cases have too."""
    kept: dict[int, int] = {}
    rows, ties = [], []
    for case, picture in rng.integers(0, [8 + 2 * number, 60 + 20 * number], (12, 2)).tolist():
        told = (make_hash("p", picture), f"c{case}", f"c{case}A", "s", "p")
        if picture in kept:
            ties.append((*told, f"c{kept[picture]}", f"c{kept[picture]}A"))
        else:
            kept[picture] = case
            rows.append((*told, SUBTYPES[case % 8]))
    columns = list(TIE_COLUMNS)
    return pd.DataFrame(rows, columns=[*columns[:5], "subtype"]), pd.DataFrame(ties, columns=columns)


def check_sides(ledger, rows, ties, quarantine):
    """No picture that is used lies on a side where another's copy, now or before, lies on another."""
    used = rows[~rows["pixel_sha256"].isin(quarantine["pixel_sha256"])]
    assert set(used["patient"]) <= ledger.sides.keys() - ledger.erased
    lies: dict[str, set[str]] = {}
    for group, pictures in ledger.images.items():
        for picture in pictures:
            lies.setdefault(picture, set()).add(ledger.sides[group])
    assert all(len(sides) == 1 for sides in lies.values())
    for picture, group in zip(used["pixel_sha256"], used["patient"], strict=True):
        assert lies[picture[:16]] == {ledger.sides[group]}
    new = set(rows["patient"]) - ledger.sides.keys()
    assert new <= set(quarantine["patient"])


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_no_case_changes_side_over_thousands_of_random_additions(seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_methods, "_RESTARTS", 1)  # what holds, holds whatever the search finds
        add_at_random(seed)


def add_at_random(seed):
    rng = np.random.default_rng(seed)
    ledger, before, refused = Ledger("l"), {}, 0
    for number in range(30):
        rows, ties = delivery(rng, number)
        try:
            ledger, quarantine = extend_ledger(ledger, rows, ties, dataset=f"dataset-{number}", seed=seed)
        except DataError as error:
            if "a split needs at least 3" not in str(error):
                raise
            refused += 1
            continue
        assert {group: ledger.sides[group] for group in before} == before
        before = ledger.sides
        check_sides(ledger, rows, ties, quarantine)
        if number % 10 == 0:
            again, same = extend_ledger(ledger, rows, ties, dataset=f"dataset-{number}", seed=seed)
            assert again is ledger
            pd.testing.assert_frame_equal(same, quarantine)
        if rng.random() < 0.1:
            ledger = ledger.erase(str(rng.choice(sorted(ledger.sides))), "asked")
    ledger.verify()
    assert refused < 10


# --- groups that early releases called otherwise ----------------------------------------------------------------------

FORMS = ["{}", "{}.0", "{}.00"]


def name_cases(frame, form):
    """The rows with the cases of a clinic's table, written in this form."""
    names = {case: f"clinic:{form.format(case.removeprefix('14-'))}" for case in frame["patient"].unique()}
    return frame.assign(patient=frame["patient"].map(names), slide=frame["patient"].map(names))


@given(st.sampled_from(FORMS), st.sampled_from(FORMS), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_a_case_keeps_its_side_under_another_form_of_its_name(before, now, random):
    cases = {f"14-{n}": (SUBTYPES[n % 8], 2) for n in range(1, 25)}
    old = name_cases(made_up.manifest_rows(cases), before)
    sides = {name: random.choice(SIDES) for name in sorted(old["patient"].unique())}
    pixels = {name: part["pixel_sha256"].tolist() for name, part in old.groupby("patient")}
    ledger = Ledger("made").append(sides, pixels, "dataset-0", 0)
    new = name_cases(made_up.manifest_rows({**cases, "14-90": ("A", 2), "14-91": ("F", 2)}), now)
    new["pixel_sha256"] = [make_hash("new", k) for k in range(len(new))]  # no picture of before ties the names
    ties = pd.DataFrame(columns=list(TIE_COLUMNS), dtype="str")
    extended, quarantine = extend_ledger(ledger, new, ties, dataset="dataset-1", seed=0)
    assert quarantine.empty
    plain = {name.partition(".")[0]: side for name, side in sides.items()}
    assert {name.partition(".")[0]: side for name, side in extended.sides.items()}.items() >= plain.items()
    known = [name for name in new["patient"] if name.partition(".")[0] in plain]
    assert len(known) == 48
    assert all(extended.sides[name] == plain[name.partition(".")[0]] for name in known)


def split_renamed(store, sides, erased=()):
    """Splits three cases and a fourth, clinic:7, with a ledger that has these sides besides; returns its quarantine."""
    others = {f"clinic:{n}": SIDES[n % 3] for n in range(1, 4)}
    ledger = Ledger("made").append({**others, **sides}, {name: [make_hash(name)] for name in sides}, "dataset-0", 0)
    for name in erased:
        ledger = ledger.erase(name, "on request")
    store.put_json("ledgers/made.json", ledger.to_json())
    frame = name_cases(made_up.manifest_rows({f"14-{n}": ("DC", 2) for n in (1, 2, 3, 7)}), "{}")
    report = split_dataset(made_up.create_dataset(store, frame), store)
    quarantine = pd.read_parquet(store.file(report["split"], "quarantine.parquet"))
    assert set(quarantine["patient"]) <= {"clinic:7"}
    return quarantine[["reason", "detail"]].drop_duplicates().to_numpy().tolist()


def test_a_case_on_two_sides_under_two_names_is_on_none(store):
    said = "case clinic:7 has two names in the ledger: clinic:7.0 (test) and clinic:7 (train)"
    assert split_renamed(store, {"clinic:7.0": "test", "clinic:7": "train"}) == [["opposite_sides", said]]


def test_a_case_on_one_side_under_two_names_stays_there(store):
    assert split_renamed(store, {"clinic:7.0": "test", "clinic:7": "test"}) == []


@pytest.mark.parametrize("also", [{}, {"clinic:7": "test"}])
def test_a_case_that_was_erased_under_its_old_name_does_not_come_back(store, also):
    erased = split_renamed(store, {"clinic:7.0": "test", **also}, erased=["clinic:7.0"])
    assert erased == [["erased", "case clinic:7 was erased"]]


def test_a_row_without_a_group_is_an_error():
    frame = made_up.manifest_rows(made_up.every_class())
    frame.loc[5, "patient"] = None
    said = rf"'patient' has no value in 1 of 96 rows, such as that of {frame['path'][5]}"
    ties = pd.DataFrame(columns=list(TIE_COLUMNS), dtype="str")
    with pytest.raises(DataError, match=said):
        extend_ledger(Ledger("made"), frame, ties, dataset="dataset-1", seed=0)
    with pytest.raises(DataError, match=said):
        look_up_sides(frame, Split("case", dict.fromkeys(frame["patient"].dropna(), "train")))
