import pytest

from ml.errors import ConfigError, DataError
from ml.settings import PROJECT, Settings
from ml.store import Store
from ml.training_sets import assemble, load_training_set, read_dataset, training_set_files, training_set_of
from tests import made_up


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
    manifest = store.create(
        "manifest", [source, len(frame)], {}, lambda d: frame.to_parquet(d / "manifest.parquet", index=False)
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
    frame = made_up.rows({"14-1": ("F", 3), "14-2": ("DC", 2)})
    publish(store, "one", frame)
    publish(store, "two", frame.iloc[2:].assign(source="two"))
    made = assemble(both, store, settings)
    assert (made["images"], made["cases"]) == (5, 2)
    assert set(made["sources"]) == {"one", "two"}
    rows = read_dataset(made["dataset"], store)
    assert set(rows["source"]) == {"made"}
    assert rows["pixel_sha256"].is_monotonic_increasing
    assert assemble(both, store, settings) == made


def test_sources_that_contradict_each_other(world):
    store, settings, both = world
    frame = made_up.rows({"14-1": ("F", 2)})
    publish(store, "one", frame)
    publish(store, "two", frame.assign(subtype="A", source="two"))
    with pytest.raises(DataError, match=r"contradict each other about 2 image\(s\)"):
        assemble(both, store, settings)


def test_a_source_without_a_version(world):
    store, settings, both = world
    with pytest.raises(DataError, match="'one' has no published version yet"):
        assemble(both, store, settings)


def test_models_and_their_sets(conf):
    settings = Settings(home=conf / "home", conf=conf)
    assert training_set_of("both-subtype", settings)[1] == "subtype"
    with pytest.raises(DataError, match="known models: both-binary, both-subtype"):
        training_set_of("other-binary", settings)
    extra = conf / "elsewhere.yaml"
    extra.write_text("name: elsewhere\nsources: [one]\nledger: l\npolicy: p\npreset: paper\n")
    settings = Settings(home=conf / "home", conf=conf, training_sets=(extra,))
    assert extra in training_set_files(settings)
    assert training_set_of("elsewhere-binary", settings)[0].file == extra


def test_a_broken_set_does_not_hide_the_others(conf):
    (conf / "training_sets" / "aaa.yaml").write_text("name: aaa\ncolour: pink\n")
    settings = Settings(home=conf / "home", conf=conf)
    assert training_set_of("both-binary", settings)[1] == "binary"
    with pytest.raises(DataError, match="unknown key 'colour'"):
        training_set_of("aaa-binary", settings)


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
    for name, preset in (("breakhis", "paper"), ("demo", "demo")):
        shipped = load_training_set(name, PROJECT / "dags")
        assert (shipped.preset, shipped.models["binary"]) == (preset, f"{name}-binary")
