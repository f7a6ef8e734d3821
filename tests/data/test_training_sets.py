import re

import pandas as pd
import pytest

from ml.core.errors import ConfigError, DataError
from ml.core.hashes import digest
from ml.core.settings import PROJECT, Settings
from ml.core.store import Store
from ml.data.manifest import read_ties
from ml.data.training_sets import (
    assemble_dataset,
    compare_datasets,
    find_training_set,
    load_training_set,
    read_dataset,
    training_set_files,
)
from tests.helpers import made_up


@pytest.fixture
def conf(tmp_path):
    for folder in ("sources", "training_sets"):
        (tmp_path / folder).mkdir()
    for source in ("one", "two"):
        (tmp_path / "sources" / f"{source}.yaml").write_text(f"name: {source}\nkind: demo\n")
    (tmp_path / "training_sets" / "both.yaml").write_text(
        "name: both\nsources: [one, two]\nledger: both\npolicy: demo\npreset: demo\n"
    )
    return tmp_path


def publish(store, source, frame):
    frame = frame.assign(source=source)
    manifest = store.create(
        "manifest", [source, frame.to_json()], {}, lambda d: frame.to_parquet(d / "manifest.parquet", index=False)
    )
    version = store.create("version", [source], {"validation": "validation-0"})
    store.put_json(f"refs/sources/{source}.json", {"version": version, "manifest": manifest})


@pytest.fixture
def world(conf):
    store = Store((conf / "store").as_uri())
    settings = Settings(home=conf / "home", conf=conf)
    return store, settings, load_training_set("both", conf)


def test_the_same_pixels_of_two_sources_are_one_image(world):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 3), "14-2": ("DC", 2)})
    publish(store, "one", frame)
    publish(store, "two", frame.iloc[2:].assign(source="two"))
    made = assemble_dataset(both, store, settings)
    assert (made["images"], made["cases"], made["duplicates"], made["ties"]) == (5, 2, 3, 0)
    assert set(made["sources"]) == {"one", "two"}
    rows = read_dataset(made["dataset"], store)
    assert set(rows["source"]) == {"one"}
    assert rows["pixel_sha256"].is_monotonic_increasing
    assert assemble_dataset(both, store, settings) == made


def test_sources_that_contradict_each_other(world):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 2)})
    publish(store, "one", frame)
    publish(store, "two", frame.assign(subtype="A", source="two"))
    with pytest.raises(DataError, match=r"contradict each other about 2 image\(s\)"):
        assemble_dataset(both, store, settings)


def test_a_picture_under_two_patients_ties_them(world):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 2), "14-2": ("F", 2)})
    publish(store, "one", frame.head(3))
    again = frame.assign(source="two", cohort="two", patient="two:7", slide="two:7A", path="7.png").iloc[[0, 3]]
    publish(store, "two", again)
    made = assemble_dataset(both, store, settings)
    assert (made["images"], made["duplicates"], made["ties"]) == (4, 1, 1)
    assert read_ties(made["dataset"], store).to_dict("records") == [
        {
            "pixel_sha256": frame["pixel_sha256"][0],
            "patient": "two:7",
            "slide": "two:7A",
            "source": "two",
            "path": "7.png",
            "kept_patient": "14-1",
            "kept_slide": "14-1",
        }
    ]
    assert read_ties(made_up.create_dataset(store, frame), store).empty


def resized(frame, source, **changes):
    """The same images as another source has them: other bytes and pixels."""
    return frame.assign(
        source=source, sha256=frame["sha256"] + "r", pixel_sha256=frame["pixel_sha256"] + "r", **changes
    )


def test_the_same_name_in_two_sources_of_a_cohort_is_one_image_the_larger(world):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 3), "14-2": ("DC", 2)})
    small = resized(frame, "one", width=224, height=224)
    small.loc[4, ["width", "height"]] = [700, 460]  # of equals the first source's
    publish(store, "one", small)
    publish(store, "two", frame.assign(source="two").tail(4))
    made = assemble_dataset(both, store, settings)
    assert (made["images"], made["cases"], made["duplicates"], made["ties"]) == (5, 2, 4, 4)
    rows = read_dataset(made["dataset"], store).set_index("path")
    assert rows.loc[frame["path"], "source"].tolist() == ["one", "two", "two", "two", "one"]
    ties = read_ties(made["dataset"], store)
    assert set(ties["pixel_sha256"]) == {*small["pixel_sha256"][1:4], frame["pixel_sha256"][4]}
    assert (ties["patient"] == ties["kept_patient"]).all()
    assert assemble_dataset(both, store, settings) == made


@pytest.mark.parametrize("change", [{"cohort": "other"}, {"path": "other.png"}])
def test_other_cohorts_and_other_file_names_are_other_images(world, change):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 3)}).assign(source="one")
    publish(store, "one", frame)
    publish(store, "two", resized(frame, "two", **change))
    assert assemble_dataset(both, store, settings)["images"] == 6


def test_a_chain_of_copies_ties_all_of_them(world):
    """A name leads from a small picture to a large one, whose pixels were published under another patient before."""
    store, settings, both = world
    large = made_up.manifest_rows({"14-1": ("F", 1)}).assign(source="two")
    small = resized(large, "one", width=224, height=224)
    other = large.assign(source="one", cohort="other", patient="other:1", slide="other:1", path="x.png")
    publish(store, "one", pd.concat([small, other], ignore_index=True))
    publish(store, "two", large)
    made = assemble_dataset(both, store, settings)
    assert (made["images"], made["duplicates"]) == (1, 2)
    ties = read_ties(made["dataset"], store)
    tied = set(zip(ties["pixel_sha256"], ties["patient"], ties["kept_patient"], strict=True))
    assert tied == {
        (small["pixel_sha256"][0], "14-1", "14-1"),
        (large["pixel_sha256"][0], "14-1", "other:1"),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subtype": "DC", "path": "b.png"}, r"about 1 slide\(s\), e.g. one: .*-001.png is F; two: b.png is DC"),
        (
            {"patient": "14-9"},
            r"about 1 slide\(s\), e.g. one: .*-001.png is of patient 14-1; two: .* is of patient 14-9",
        ),
        ({"subtype": "DC", "slide": "14-9"}, r"about 1 image\(s\), e.g. one: .*-001.png is F; two: .*-001.png is DC"),
    ],
)
def test_a_slide_or_a_name_that_two_sources_of_a_cohort_tell_differently(world, change, said):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 1)}).assign(source="one")
    publish(store, "one", frame)
    publish(store, "two", resized(frame, "two", **change))
    with pytest.raises(DataError, match=said):
        assemble_dataset(both, store, settings)
    publish(store, "two", resized(frame, "two", cohort="other", **change))
    assert assemble_dataset(both, store, settings)["images"] == 2


def mirrored(frame, **changes):
    """The same pictures as another source has them, mirrored: other pixels and names, other patients."""
    hashes = frame["perceptual_hash"].str
    other = resized(frame, "two", cohort="two", **changes)
    return other.assign(path="m/" + frame["path"].str[-5:], perceptual_hash=hashes[16:32] + hashes[:16] + hashes[32:])


@pytest.fixture
def looks():
    """Five images of two patients, with a hash for each of eight orientations."""
    frame = made_up.manifest_rows({"14-1": ("F", 3), "14-2": ("DC", 2)})
    return frame.assign(perceptual_hash=[digest([path, 1]) + digest([path, 2]) for path in frame["path"]])


def test_pictures_that_look_the_same_in_two_sources_under_two_patients_are_a_warning(world, looks, capsys):
    store, settings, both = world
    publish(store, "one", looks)
    publish(store, "two", mirrored(looks, patient="two:7", slide="two:7"))
    made = assemble_dataset(both, store, settings)
    assert (made["images"], made["near_copies"]) == (10, 5)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith(
        f"warning: {both.file}: 5 pair(s) of pictures of the sources one and two look the same under"
    )
    pairs = [
        f"one: {path} of {who} and two: m/{path[-5:]} of two:7" for path, who in looks[["path", "patient"]].to_numpy()
    ]
    assert sum(pair in line for pair in pairs) == 3
    assert "two:7" not in str(store.meta(made["dataset"]))  # erasing the patient would leave it there
    # Of one patient they are serial sections; as in a version of an early release, one hash is compared with all.
    publish(store, "two", mirrored(looks, patient=looks["patient"], slide="two:" + looks["slide"]))
    assert assemble_dataset(both, store, settings)["near_copies"] == 0
    early = mirrored(looks, patient="two:7", slide="two:7")
    publish(store, "two", early.assign(perceptual_hash=early["perceptual_hash"].str[:16]))
    assert assemble_dataset(both, store, settings)["near_copies"] == 5
    publish(store, "two", made_up.manifest_rows({"14-3": ("F", 3)}))
    assert assemble_dataset(both, store, settings)["near_copies"] == 0
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]) == 1


def test_sources_say_how_near_is_too_near_and_whether_it_is_an_error(world, conf, looks):
    store, settings, both = world
    publish(store, "one", looks)
    apart = looks.assign(
        perceptual_hash=[f"{int(look[:16], 16) ^ 0xFF:016x}{look[16:]}" for look in looks["perceptual_hash"]]
    )
    publish(store, "two", resized(apart, "two", cohort="two", patient="two:7", slide="two:7", path="x" + looks["path"]))
    assert assemble_dataset(both, store, settings)["near_copies"] == 0
    file = conf / "sources" / "two.yaml"
    file.write_text("name: two\nkind: demo\nvalidation: {near_duplicates: {distance: 8}}\n")
    assert assemble_dataset(both, store, settings)["near_copies"] == 5
    file.write_text("name: two\nkind: demo\nvalidation: {near_duplicates: {distance: 8, severity: critical}}\n")
    with pytest.raises(
        DataError, match=r"both.yaml: 5 pair\(s\) .* look the same under two patients; .*; mend a source"
    ):
        assemble_dataset(both, store, settings)


def test_a_version_without_cohorts_is_to_be_ingested_again(world):
    store, settings, both = world
    publish(store, "one", made_up.manifest_rows({"14-1": ("F", 1)}).drop(columns="cohort"))
    with pytest.raises(DataError, match="breakhis ingest one"):
        assemble_dataset(both, store, settings)


def test_method_and_group_come_with_the_dataset(world, conf):
    store, settings, both = world
    frame = made_up.manifest_rows({"14-1": ("F", 1)})
    publish(store, "one", frame)
    publish(store, "two", frame)
    made = assemble_dataset(both, store, settings)
    assert store.meta(made["dataset"])["split"] == {"method": "allocator", "group": "case"}
    file = conf / "training_sets" / "both.yaml"
    file.write_text(file.read_text() + "split: {method: sgkf, group: slide}\n")
    other = assemble_dataset(load_training_set("both", conf), store, settings)
    assert other["dataset"] != made["dataset"]
    assert store.meta(other["dataset"])["split"] == {"method": "sgkf", "group": "slide"}


def test_a_source_without_a_version(world):
    store, settings, both = world
    with pytest.raises(DataError, match="'one' has no published version yet"):
        assemble_dataset(both, store, settings)


def test_models_and_their_sets(conf):
    settings = Settings(home=conf / "home", conf=conf)
    assert find_training_set("both-subtype", settings)[1] == "subtype"
    with pytest.raises(DataError, match="known models: both-binary, both-subtype"):
        find_training_set("other-binary", settings)
    extra = conf / "elsewhere.yaml"
    extra.write_text("name: elsewhere\nsources: [one]\nledger: l\npolicy: p\npreset: paper\n")
    settings = Settings(home=conf / "home", conf=conf, training_sets=(extra,))
    assert extra in training_set_files(settings)
    assert find_training_set("elsewhere-binary", settings)[0].file == extra


def test_a_broken_set_does_not_hide_the_others(conf):
    (conf / "training_sets" / "aaa.yaml").write_text("name: aaa\ncolour: pink\n")
    settings = Settings(home=conf / "home", conf=conf)
    assert find_training_set("both-binary", settings)[1] == "binary"
    with pytest.raises(DataError, match="unknown key 'colour'"):
        find_training_set("bbb-binary", settings)


def test_a_broken_set_leaves_its_models_to_no_other_of_its_name(conf):
    """Another file would bring another policy."""
    good = conf / "elsewhere" / "mine.yaml"
    good.parent.mkdir()
    good.write_text("name: mine\nsources: [one]\nledger: l\npolicy: strict\npreset: paper\n")
    broken = conf / "training_sets" / "mine.yaml"
    settings = Settings(home=conf / "home", conf=conf, training_sets=(good,))
    for text in ("name: mine\npolicy: a\npolicy: b\n", "name: [", "name: mine\nbinary: {f1: {x: 1}}\n", "\x00", "- a"):
        broken.write_text(text)
        for model in ("mine-binary", "mine-subtype"):
            with pytest.raises(ConfigError, match=rf"^{re.escape(str(broken))}: "):
                find_training_set(model, settings)
        assert find_training_set("both-binary", settings)[0].name == "both"
    broken.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(broken))}: "):
        find_training_set("mine-binary", settings)
    broken.unlink()
    assert find_training_set("mine-binary", settings)[0].file == good


def test_a_set_is_called_as_its_file(conf):
    (conf / "training_sets" / "both.yaml").rename(conf / "training_sets" / "twin.yaml")
    with pytest.raises(ConfigError, match="'name' is 'both'; call it 'twin'"):
        load_training_set("twin", conf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preset: magic", "'preset'"),
        ("sources: []", "'sources'"),
        ("name: Bad Name", "'name'"),
        ("schedule: sometimes", "'schedule'"),
        ("colour: pink", "unknown key 'colour'"),
        ("split: {group: person}", "'split.group'"),
        ("split: {folds: 5}", "unknown key 'split.folds'"),
    ],
)
def test_bad_training_sets_name_file_and_key(conf, change, message):
    key = change.partition(":")[0]
    file = conf / "training_sets" / "both.yaml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, change]))
    with pytest.raises(ConfigError, match=message) as caught:
        load_training_set("both", conf)
    assert "both.yaml" in str(caught.value)


def test_shipped_sets():
    for name, preset in (("breakhis", "default"), ("demo", "demo")):
        shipped = load_training_set(name, PROJECT / "dags")
        assert (shipped.preset, shipped.models["binary"]) == (preset, f"{name}-binary")


def test_what_changed_between_two_datasets(tmp_path) -> None:
    store = Store((tmp_path / "store").as_uri())
    before = made_up.manifest_rows({"14-1": ("A", 2), "14-2": ("DC", 3), "14-3": ("F", 1)})
    after = made_up.manifest_rows({"14-1": ("A", 2), "14-2": ("DC", 2), "14-4": ("LC", 4), "14-5": ("PC", 1)})
    after.loc[after["patient"] == "14-1", "subtype"] = ["F", "A"]
    after.loc[after["patient"] == "14-5", "source"] = "other"
    changes = compare_datasets(made_up.create_dataset(store, before), made_up.create_dataset(store, after), store)
    assert changes == {
        "made": {
            "added": {"images": 4, "cases": 1},
            "removed": {"images": 2, "cases": 2},
            "relabelled": {"images": 1, "cases": 1},
        },
        "other": {
            "added": {"images": 1, "cases": 1},
            "removed": {"images": 0, "cases": 0},
            "relabelled": {"images": 0, "cases": 0},
        },
    }


# --- names that early releases gave patients -------------------------------------------------------------------------


def test_a_patient_of_an_early_release_has_the_present_name(world):
    store, settings, both = world
    frame = made_up.manifest_rows({"clinic:1": ("F", 3), "clinic:2": ("DC", 2)})
    publish(store, "one", frame.iloc[:3].assign(patient="clinic:1.0", slide="clinic:1.0"))
    publish(store, "two", pd.concat([frame.iloc[3:], frame.iloc[:1].assign(pixel_sha256="9" * 64, path="9.png")]))
    made = assemble_dataset(both, store, settings)
    rows = read_dataset(made["dataset"], store)
    assert (made["images"], made["cases"]) == (6, 2)
    assert set(rows["patient"]) == set(rows["slide"]) == {"clinic:1", "clinic:2"}


@pytest.mark.parametrize("published", ["clinic:1", "clinic:1.0"])
@pytest.mark.parametrize("listed", ["clinic:1", "clinic:1.0"])
def test_an_erased_patient_who_is_back_in_a_version_is_an_error(world, published, listed):
    store, settings, both = world
    frame = made_up.manifest_rows({"clinic:1": ("F", 3), "clinic:2": ("DC", 2)}).assign(cohort="clinic")
    publish(store, "one", frame.assign(patient=frame["patient"].replace("clinic:1", published)))
    publish(store, "two", frame.iloc[3:])
    store.put_json("refs/erased/clinic.json", {listed: {"why": "on request"}})
    with pytest.raises(DataError, match="images of clinic:1, who was erased; erase these too"):
        assemble_dataset(both, store, settings)
