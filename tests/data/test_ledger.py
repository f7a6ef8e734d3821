import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.errors import Conflict, DataError, StoreError
from ml.core.hashes import digest
from ml.core.store import Store
from ml.core.taxonomy import SIDES
from ml.data.ledger import Ledger, erase_from_ledgers, read_ledger
from ml.data.splits import QUARANTINED, look_up_sides, read_split, split_dataset
from tests.data.ledger_helpers import make_hash, write_old_ledger
from tests.helpers import made_up


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path.as_uri())


def test_a_case_cannot_be_appended_twice():
    ledger = Ledger("l").append({"a": "train"}, {}, "dataset-1", 0)
    with pytest.raises(DataError, match="case a has its side already"):
        ledger.append({"a": "test"}, {}, "dataset-2", 0)


def test_a_picture_cannot_lie_on_two_sides():
    ledger = Ledger("l").append({"a": "train"}, {"a": [make_hash(1)]}, "dataset-1", 0)
    with pytest.raises(DataError, match=f"picture {make_hash(1)[:16]} would lie on two sides"):
        ledger.append({"b": "test"}, {"b": [make_hash(1)]}, "dataset-2", 0)
    with pytest.raises(DataError, match="case c has no side"):
        ledger.append({}, {"c": [make_hash(2)]}, "dataset-2", 0)


def test_an_edited_ledger_is_refused(store):
    split_dataset(made_up.create_dataset(store, made_up.manifest_rows(made_up.every_class())), store)
    whole, _ = store.read("ledgers/made.json")

    def edited(change):
        value = json.loads(json.dumps(whole))
        change(value)
        store.put_json("ledgers/made.json", value)
        with pytest.raises(StoreError) as caught:
            read_ledger("made", store)
        return str(caught.value)

    entry = whole["entries"][0]
    case, side = next(iter(entry["added"].items()))
    other = "test" if side != "test" else "train"
    assert "entry 1 does not fit its hash" in edited(lambda v: v["entries"][0]["added"].update({case: other}))
    assert "entry 1 does not fit its hash" in edited(lambda v: v["entries"][0]["images"][case].pop())
    assert "entry 1 does not fit its hash" in edited(lambda v: v.update(group="slide"))
    assert "entries were removed from its end" in edited(lambda v: v["entries"].pop())
    assert "made.json is no ledger (ValueError('Out of range float" in edited(lambda v: v.update(group=float("nan")))
    assert "made.json is damaged: it has no 'entries'" in edited(lambda v: v.pop("entries"))
    assert f"the pictures of case {case} are missing in entry 1" in edited(
        lambda v: v["entries"][0]["images"].update({case: digest(entry["images"][case])})
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"added": {"b": "test"}, "images": {"b": [make_hash(1)[:16]]}}, "picture .* lies on two sides"),
        ({"added": {"a": "test"}, "images": {}}, "case a is given a side twice"),
    ],
)
def test_a_ledger_with_anything_on_two_sides_is_refused_though_its_hashes_hold(store, second, message):
    ledger = Ledger("l").append({"a": "train"}, {"a": [make_hash(1)]}, "dataset-1", 0)
    ledger = ledger._append_entry({**second, "dataset": "dataset-2", "seed": 0})
    store.put_json("ledgers/l.json", ledger.to_json())
    with pytest.raises(StoreError, match=message):
        read_ledger("l", store)


def test_a_ledger_of_old_learns_the_pictures_with_the_next_entry(store):
    cases = made_up.every_class()
    sides = {case: SIDES[n % 3] for n, case in enumerate(cases)}
    old = write_old_ledger(store, sides)
    ledger, _ = read_ledger("made", store)
    assert (ledger.sides, ledger.images, ledger.hash) == (sides, {}, old["hash"])
    frame = made_up.manifest_rows(cases)
    split = split_dataset(made_up.create_dataset(store, frame), store)
    assert read_split(split["split"], store).sides == sides
    ledger, _ = read_ledger("made", store)
    assert ledger.entries[0] == old
    assert ledger.entries[1]["added"] == {}
    assert {g: len(pictures) for g, pictures in ledger.images.items()} == dict.fromkeys(cases, 4)


def test_new_pictures_of_known_cases_are_an_entry_and_nothing_new_is_none(store):
    frame = made_up.manifest_rows(made_up.every_class(images=4))
    fewer = frame[frame["seq"] <= 3]
    split_dataset(made_up.create_dataset(store, fewer), store)
    before, _ = read_ledger("made", store)
    dataset = made_up.create_dataset(store, frame)
    split_dataset(dataset, store)
    after, _ = read_ledger("made", store)
    assert after.entries[:1] == before.entries
    assert after.entries[1]["added"] == {}
    assert set(after.entries[1]["images"]) == set(frame["patient"])
    assert all(len(pictures) == 1 for pictures in after.entries[1]["images"].values())
    for again in (fewer, frame):
        split_dataset(made_up.create_dataset(store, again), store)
    assert read_ledger("made", store)[0] == after


def test_a_ledger_keeps_method_and_group(store):
    frame = made_up.manifest_rows(made_up.every_class())
    split_dataset(made_up.create_dataset(store, frame, method="sgkf", group="slide"), store)
    with pytest.raises(
        DataError, match=r"by case with the method allocator, .* by slide with the method sgkf"
    ) as caught:
        split_dataset(made_up.create_dataset(store, frame), store)
    assert "name another ledger" in str(caught.value)


def test_another_run_in_between_is_taken_in(store, monkeypatch):
    """The ledger grows between reading and writing: what the other run allotted stands."""
    frame = made_up.manifest_rows(made_up.every_class())
    dataset = made_up.create_dataset(store, frame)
    write = store.compare_and_set
    came_first = dict.fromkeys(set(frame["patient"]), "train") | {"14-0": "test", "14-1": "validation"}

    def lose_once(key, value, tag):
        monkeypatch.setattr(store, "compare_and_set", write)
        write(key, Ledger("made").append(came_first, {}, "dataset-9", 0).to_json(), None)
        raise Conflict("lost")

    monkeypatch.setattr(store, "compare_and_set", lose_once)
    split = split_dataset(dataset, store)
    assert read_split(split["split"], store).sides == came_first
    assert len(read_ledger("made", store)[0].entries) == 2


# --- erasure ---------------------------------------------------------------------------------------------------------


def test_an_erased_case_keeps_its_side_and_its_pictures_are_forgotten(any_store):
    store = any_store
    frame = made_up.manifest_rows(made_up.every_class())
    case = "14-3001"
    first = split_dataset(made_up.create_dataset(store, frame), store)
    split_dataset(made_up.create_dataset(store, frame, ledger="by-slide", group="slide"), store)
    split_dataset(made_up.create_dataset(store, frame[frame["patient"] != case], ledger="stranger"), store)
    assert erase_from_ledgers(case, [case], store) == ["by-slide", "made"]
    assert erase_from_ledgers(case, [case], store) == ["by-slide", "made"]
    ledger, _ = read_ledger("made", store)
    assert [entry["erased"] for entry in ledger.entries if "erased" in entry] == [case]
    assert ledger.sides == read_split(first["split"], store).sides
    assert case not in ledger.images
    text = json.dumps(store.read("ledgers/made.json")[0])
    assert not any(pixels[:16] in text for pixels in frame[frame["patient"] == case]["pixel_sha256"])

    # Its rows come again, with a picture more.
    more = pd.concat([frame, made_up.manifest_rows({case: ("TA", 5)}).tail(1)])
    again = split_dataset(made_up.create_dataset(store, more), store)
    assert again["quarantined"] == {"erased": 5}
    split = read_split(again["split"], store)
    assert case not in split.sides
    assert (look_up_sides(more, split) == QUARANTINED).tolist() == (more["patient"] == case).tolist()
    assert read_ledger("made", store)[0] == ledger


def test_only_what_a_ledger_knows_can_be_erased():
    with pytest.raises(DataError, match="knows no case 'x'"):
        Ledger("l").erase("x", "asked")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["append", "erase"]), st.integers(0, 7)), max_size=12))
def test_chains_hold_however_appends_and_erasures_follow(steps):
    ledger = Ledger("l")
    for number, (what, n) in enumerate(steps):
        before, group = ledger.sides, f"c{n}"
        if what == "erase" and group in before:
            ledger = ledger.erase(group, "asked")
        elif what == "append" and group not in before:
            ledger = ledger.append({group: SIDES[n % 3]}, {group: [make_hash(n), make_hash(n, number)]}, "dataset", 0)
        elif what == "append" and group not in ledger.erased:
            ledger = ledger.append({}, {group: [make_hash(n, number)]}, "dataset", 0)
        assert {g: ledger.sides[g] for g in before} == before
        assert not ledger.erased & ledger.images.keys()
    assert ledger.verify().hash == ledger.hash
