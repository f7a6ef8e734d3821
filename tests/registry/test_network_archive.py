"""What may be in a network's file: the layers of image classifiers, and nothing that names code."""

import copy
import json
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import Refused
from ml.registry.network_archive import LAYERS, check_network_archive

DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}, "registered_name": None}
CONFIG = {
    "module": "keras.src.models.functional",
    "class_name": "Functional",
    "registered_name": "Functional",
    "config": {
        "name": "made_up",
        "layers": [
            {
                **{"module": "keras.layers", "class_name": "Conv2D", "registered_name": None, "name": "conv"},
                "config": {
                    "dtype": {
                        **{"module": "keras", "class_name": "DTypePolicy", "registered_name": None},
                        "config": {"name": "mixed_float16"},
                    },
                    "kernel_initializer": {
                        **{"module": "keras.initializers", "class_name": "VarianceScaling", "registered_name": None},
                        "config": {"seed": None},
                    },
                    "activation": "swish",
                },
                "inbound_nodes": [{"args": [{"class_name": "__keras_tensor__", "config": {"shape": [None]}}]}],
            },
            DENSE,
        ],
    },
    "build_config": {"input_shape": None},
}
MEMBERS = {"metadata.json": "{}", "config.json": json.dumps(CONFIG), "model.weights.h5": "weights"}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes an archive with changed members; a member that is None is left out. Returns its path."""
    folder = tmp_path_factory.mktemp("archives")

    def write(config=None, **members):
        file = folder / "network.keras"
        content = MEMBERS | ({"config.json": json.dumps(config)} if config is not None else {}) | members
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in content.items():
                if data is not None:
                    archive.writestr(name, data)
        return file

    return write


def test_what_keras_saves_of_our_networks_is_accepted(tmp_path, write):
    import keras

    from ml.training.networks import build_classifier, build_head

    check_network_archive(write())
    pixels = keras.Input((224, 224, 3))
    backbone = keras.applications.EfficientNetB0(include_top=False, weights=None, input_tensor=pixels, pooling="avg")
    head = build_head("subtype", dropout=0.5, standardize=True)
    file = tmp_path / "network.keras"
    build_classifier(backbone, head, bias=[0.0] * 8).save(file)
    check_network_archive(file)


def list_parents(value, path=()):
    """Yields the path of every object and list in nested JSON."""
    if isinstance(value, dict | list):
        yield path
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from list_parents(item, (*path, key))


FOREIGN = st.one_of(
    st.sampled_from(
        [
            {"module": "keras.layers", "class_name": "Lambda", "config": {}},
            {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "/x"}},
            {"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {}},
            {"module": "builtins", "class_name": "function", "config": "print", "registered_name": "function"},
            {"module": "os", "class_name": "function", "config": "system", "registered_name": None},
            {"module": "keras.utils", "class_name": "get_file", "config": {}},
            {"module": None, "class_name": "Own", "config": {}, "registered_name": "package>Own"},
            {"class_name": "__lambda__", "config": {"value": "x"}},
            {"class_name": "__typespec__", "spec_name": "x", "module": "os", "config": []},
            {"class_name": "Dense", "config": {}},
            {**DENSE, "registered_name": "package>Dense"},
            {**DENSE, "module": "package.layers"},
            {**DENSE, "class_name": ["Dense"]},
            {**DENSE, "module": {"keras": "layers"}},
            {"module": "os", "config": {}},
            {"registered_name": "package>Own", "config": {}},
        ]
    ),
    st.builds(
        lambda module, name: {"module": module, "class_name": name, "config": {}},
        st.text() | st.sampled_from(["keras", "keras.layers", "keras.saving"]),
        st.text(min_size=1).filter(lambda name: name not in {*LAYERS, "DTypePolicy", "Sequential", "Functional"}),
    ),
)


@given(place=st.sampled_from(sorted(list_parents(CONFIG), key=str)), foreign=FOREIGN)
def test_a_foreign_object_is_refused_wherever_it_stands(write, place, foreign):
    config = copy.deepcopy(CONFIG)
    parent = config
    for key in place:
        parent = parent[key]
    if isinstance(parent, list):
        parent.append(foreign)
    else:
        parent["another"] = foreign
    with pytest.raises(Refused, match=r"network\.keras: its configuration names "):
        check_network_archive(write(config))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"assets/x": ""}, "differs in 'assets/x'"),
        ({"model.weights.h5": None}, r"differs in 'model\.weights\.h5'"),
        ({"config.json": "{"}, "is no network that Keras has saved"),
        ({"config.json": "[" * 100_000}, "is no network that Keras has saved"),
        ({"config.json": "[]"}, "is not that of a network of layers"),
        ({"config.json": json.dumps(DENSE)}, "is not that of a network of layers"),
        ({"metadata.json": " " * (33 * 2**20)}, r"metadata\.json has 34,603,008 bytes; at most 33,554,432"),
    ],
)
def test_an_archive_of_another_make_is_refused(write, members, message):
    with pytest.raises(Refused, match=message):
        check_network_archive(write(**members))


def test_what_is_no_archive_is_refused(tmp_path):
    file = tmp_path / "network.keras"
    for content in (b"", b"text", b"\x89HDF\r\n\x1a\n"):
        file.write_bytes(content)
        with pytest.raises(Refused, match="is no network that Keras has saved"):
            check_network_archive(file)
