import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from ml import models
from ml.errors import StoreError, WeightsError
from ml.models import FEATURES, build_head, join, load_backbone, resolve_weights
from ml.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store").as_uri())


@pytest.fixture(scope="module")
def random(store):
    return resolve_weights("random", store)


@pytest.fixture(scope="module")
def pixels():
    return models._calibration_pictures()[:6]


@pytest.fixture(scope="module")
def notop(tmp_path_factory):
    """Weights in the form of Keras' own no-top file."""
    keras.utils.set_random_seed(3)
    network = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(224, 224, 3))
    normalization = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    normalization.set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]), np.array(0)])
    file = tmp_path_factory.mktemp("weights") / "notop.h5"
    with h5py.File(file, "w") as h5:
        legacy_h5_format.save_weights_to_hdf5_group(h5, network)
    return file


def test_random_weights_are_the_same_again_and_say_something(store, random, pixels, tmp_path):
    assert random.kind == "random"
    assert not random.pretrained
    assert resolve_weights("random", store) == random
    assert resolve_weights("random", Store(tmp_path.as_uri())).id == random.id
    features = np.asarray(load_backbone(random.id, store)(pixels, training=False))
    assert features.shape == (6, FEATURES)
    assert 0.05 < features.std(axis=0).mean() < 20


def test_a_notop_file_gives_what_keras_makes_of_it_as_imagenet(store, notop, pixels, monkeypatch):
    from keras.src.applications import efficientnet

    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *_, **__: str(notop))
    expected = keras.applications.EfficientNetB0(
        include_top=False, weights="imagenet", input_shape=(224, 224, 3), pooling="avg"
    )(pixels, training=False)
    weights = resolve_weights(str(notop), store)
    assert (weights.kind, weights.pretrained) == ("file", True)
    found = load_backbone(weights.id, store)(pixels, training=False)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


def test_a_whole_backbone_from_a_keras_file_by_path_and_uri(store, random, tmp_path):
    file = tmp_path / "my own.keras"
    file.write_bytes(store.file(random.id, "backbone.keras").read_bytes())
    by_path = resolve_weights(str(file), store)
    assert by_path.kind == "file"
    assert resolve_weights(file.as_uri(), store).id == by_path.id


def test_a_store_that_does_not_answer_is_named(store, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WeightsError, match=r"s3://bucket/b0\.h5: cannot be read: .*127\.0\.0\.1:9"):
        resolve_weights("s3://bucket/b0.h5", store)


def test_files_that_are_no_weights(store, tmp_path):
    for name, content, message in (
        ("a.h5", b"text", "not EfficientNetB0's no-top weights"),
        ("a.keras", b"text", "not a Keras model"),
        ("a.bin", b"text", "expected a no-top .h5 or a .keras file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            resolve_weights(str(tmp_path / name), store)
    with pytest.raises(WeightsError, match="no such file"):
        resolve_weights(str(tmp_path / "gone.h5"), store)
    other = tmp_path / "other.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(other)
    with pytest.raises(WeightsError, match=r"takes \(None, 4\) and returns \(None, 2\)"):
        resolve_weights(str(other), store)


def test_imagenet_weights_that_cannot_be_had(tmp_path, random, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(models, "getproxies", dict)

    def refused(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(models.socket, "create_connection", refused)
    store = Store(tmp_path.as_uri())
    with pytest.raises(WeightsError, match=r"Network is unreachable.*set BREAKHIS_WEIGHTS"):
        resolve_weights("imagenet", store)
    fallen_back = resolve_weights("imagenet", store, or_random=True)
    assert fallen_back.id == random.id
    assert "RANDOM BACKBONE WEIGHTS" in capsys.readouterr().err


def test_unknown_weights(store):
    with pytest.raises(StoreError, match="no such weights"):
        load_backbone("weights-0123456789ab", store)


@pytest.mark.parametrize(("task", "outputs", "last"), [("binary", 1, "sigmoid"), ("subtype", 8, "softmax")])
def test_the_head_is_as_the_recipe_has_it(task, outputs, last):
    head = build_head(task, dropout=0.4, features=None)
    hidden, dropout, output = head.layers[1:]
    assert (hidden.units, hidden.activation.__name__) == (512, "relu")
    assert dropout.rate == 0.4
    assert (output.units, output.activation.__name__) == (outputs, last)


def test_standardized_inputs():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (50, FEATURES)).astype(np.float32)
    head = build_head("binary", dropout=0, features=features)
    standardized = head.get_layer("standardize")(features)
    assert np.abs(np.mean(standardized, axis=0)).max() < 1e-3
    assert np.allclose(np.std(standardized, axis=0), 1, atol=1e-2)


def test_joined_network_is_head_of_backbone(store, random, pixels):
    backbone = load_backbone(random.id, store)
    head = build_head("subtype", dropout=0.5, features=None)
    network = join(backbone, head)
    expected = head(backbone(pixels, training=False), training=False)
    assert np.allclose(network(pixels, training=False), expected, atol=1e-5)
