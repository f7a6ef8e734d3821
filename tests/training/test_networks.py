import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import keras
import numpy as np
import pytest
from cloudpathlib import S3Client
from keras.src.legacy.saving import legacy_h5_format

from ml.core.errors import StoreError, TryAgain, WeightsError
from ml.core.store import Store
from ml.training import backbone_weights, imagenet_download
from ml.training.backbone_weights import FEATURE_SIZE, fetch_weights, load_backbone, look_up_weights, resolve_weights
from ml.training.cross_validation import to_probabilities
from ml.training.networks import build_classifier, build_head, set_standardization
from tests.helpers.dripping import drip, lowered_limit
from tests.helpers.old_objects import drop_checksums


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store").as_uri())


@pytest.fixture(scope="module")
def random(store):
    return resolve_weights("random", store)


@pytest.fixture(scope="module")
def pixels():
    return backbone_weights._calibration_pictures()[:6]


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
    assert features.shape == (6, FEATURE_SIZE)
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


def use_s3_at(address, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_store_that_does_not_answer_is_named(store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    use_s3_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(WeightsError, match=r"s3://bucket/b0\.h5: cannot be read: .*127\.0\.0\.1:9"):
        resolve_weights("s3://bucket/b0.h5", store)


def test_a_store_that_drips_is_given_up(store, monkeypatch):
    """The server answers the request for the file's content a few bytes at a time."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            for name, value in {
                "Content-Length": "70000",
                "ETag": '"x"',
                "Last-Modified": formatdate(usegmt=True),
            }.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            drip(self.wfile.write, bytes(70_000))

        def log_message(self, *_):
            pass

    monkeypatch.setattr(S3Client, "_default_client", None)  # that of an earlier test has its address
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, lowered_limit():
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_s3_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        with pytest.raises(TryAgain, match=r"BREAKHIS_WEIGHTS: s3://bucket/b0\.h5: its server sends less than"):
            resolve_weights("s3://bucket/b0.h5", store)
        server.shutdown()


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
    monkeypatch.setattr(imagenet_download, "getproxies", dict)

    def refused(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(imagenet_download.socket, "create_connection", refused)
    store = Store(tmp_path.as_uri())
    with pytest.raises(WeightsError, match=r"Network is unreachable.*set BREAKHIS_WEIGHTS"):
        resolve_weights("imagenet", store)
    fallen_back = resolve_weights("imagenet", store, allow_random=True)
    assert fallen_back.id == random.id
    assert "RANDOM BACKBONE WEIGHTS" in capsys.readouterr().err
    stage = fetch_weights("imagenet", store, allow_random=True)
    assert (stage["weights"], stage["kind"], stage["from"]) == (random.id, "random", "random")


def test_weights_in_the_store_need_no_way_out(tmp_path, notop, monkeypatch):
    def refused(*_, **__):
        raise OSError("Network is unreachable")

    store = Store((tmp_path / "store").as_uri())
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with monkeypatch.context() as online:
        online.setattr(backbone_weights, "check_download", lambda: None)
        online.setattr(backbone_weights, "fetch_imagenet_file", lambda: notop)
        made = fetch_weights("imagenet", store, allow_random=False)
    assert (made["kind"], made["from"], made["pretrained"]) == ("imagenet", "imagenet", True)
    assert made["sha256"] == store.meta(made["weights"])["sha256"]
    monkeypatch.setattr(imagenet_download.socket, "create_connection", refused)
    monkeypatch.setattr(backbone_weights, "fetch_imagenet_file", refused)
    elsewhere = Store(store.root)
    assert fetch_weights("imagenet", elsewhere, allow_random=False) == made
    assert look_up_weights(made["weights"], elsewhere) == (made["weights"], "imagenet")
    assert not load_backbone(made["weights"], elsewhere).trainable
    assert not imagenet_download.imagenet_cache_file().exists()


def test_two_that_resolve_at_once_come_to_the_same(tmp_path, store, random, monkeypatch):
    backbone, both = load_backbone(random.id, store), threading.Barrier(2)

    def load(_):
        both.wait(60)
        return backbone, "imagenet"

    monkeypatch.setattr(backbone_weights, "_load", load)
    fresh = Store(tmp_path.as_uri())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve_weights("imagenet", fresh), range(2))
    assert first == second
    assert len(fresh.keys("objects/weights")) == 1
    load_backbone(first.id, fresh)


def test_damaged_weights_are_named(tmp_path, store, random):
    damages = (lambda data: b"", lambda data: data[:5000], lambda data: data[:-5000], lambda data: b"text" * 99)
    for damage, has_checksums in itertools.product(damages, (True, False)):
        damaged = Store((tmp_path / "store").as_uri())
        target = damaged.path(f"{damaged.object_key(random.id)}")
        target.mkdir(parents=True, exist_ok=True)
        for name in ("object.json", "backbone.keras"):
            (target / name).write_bytes(store.file(random.id, name).read_bytes())
        if not has_checksums:
            drop_checksums(damaged, random.id)
        file = target / "backbone.keras"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(StoreError, match=rf"{random.id}/backbone.keras is damaged: .*run 'breakhis weights' again"):
            load_backbone(random.id, damaged)


def test_other_weights_than_were_recorded_are_not_used(tmp_path, store, random):
    other = Store(tmp_path.as_uri())
    target = other.path(other.object_key(random.id))
    target.mkdir(parents=True)
    (target / "object.json").write_bytes(store.file(random.id, "object.json").read_bytes())
    drop_checksums(other, random.id)
    backbone = load_backbone(random.id, store)
    changed = [array + 1 if k == 3 else array for k, array in enumerate(backbone.get_weights())]
    backbone.set_weights(changed)
    backbone.save(target / "backbone.keras")
    with pytest.raises(StoreError, match=f"{random.id}/backbone.keras is damaged: it holds other weights"):
        load_backbone(random.id, other)


def test_unknown_weights(store):
    with pytest.raises(StoreError, match="no such weights"):
        load_backbone("weights-0123456789ab", store)


@pytest.mark.parametrize(("task", "outputs"), [("binary", 1), ("subtype", 8)])
def test_the_head_is_as_the_recipe_has_it(task, outputs):
    head = build_head(task, dropout=0.4, standardize=False)
    hidden, dropout, output = head.layers[1:]
    assert (hidden.units, hidden.activation.__name__) == (512, "relu")
    assert dropout.rate == 0.4
    assert (output.units, output.activation.__name__) == (outputs, "linear")


def test_standardized_inputs():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (50, FEATURE_SIZE)).astype(np.float32)
    features[:, 0] = 5  # no variance to divide by
    head = build_head("binary", dropout=0, standardize=True)
    set_standardization(head, features.mean(axis=0), features.var(axis=0))
    standardized = np.asarray(head.get_layer("standardize")(features, training=True))
    assert np.abs(standardized.mean(axis=0)).max() < 1e-3
    assert np.allclose(standardized[:, 1:].std(axis=0), 1, atol=1e-2)
    assert head.trainable_variables[0].shape == (FEATURE_SIZE, 512)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_joined_network_is_calibrated_head_of_backbone(store, random, pixels, task):
    backbone = load_backbone(random.id, store)
    head = build_head(task, dropout=0.5, standardize=True)
    bias = np.linspace(-1, 1, 8) if task == "subtype" else np.array([0.7])
    network = build_classifier(backbone, head, bias=bias, temperature=1.7)
    logits = np.asarray(head(backbone(pixels, training=False), training=False), dtype=np.float64)
    expected = to_probabilities((logits + bias) / 1.7)
    assert np.allclose(np.asarray(network(pixels, training=False)).reshape(expected.shape), expected, atol=1e-5)
