"""What may be in the file of a trained network, ``network.keras``, before Keras reads it.

The file is a ZIP archive of a configuration, from which Keras makes objects, and of weights. A configuration can name
any class of any module, and some of Keras' own layers run code that the file carries. So only what an image classifier
is made of is read: layers that compute, and what their configurations hold.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ml.core.errors import Refused

_MEMBERS = frozenset({"metadata.json", "config.json", "model.weights.h5"})
_MAX_CONFIG_BYTES, _MAX_WEIGHTS_BYTES = 32 * 2**20, 2 * 2**30

LAYERS = frozenset(
    {
        *("InputLayer", "Rescaling", "Normalization", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"),
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "Activation", "ReLU", "LeakyReLU"),
        *("Softmax", "ZeroPadding2D", "Cropping2D", "MaxPooling2D", "AveragePooling2D", "GlobalAveragePooling2D"),
        *("GlobalMaxPooling2D", "Add", "Multiply", "Concatenate", "Average", "Reshape", "Flatten", "Permute"),
        *("Dropout", "SpatialDropout2D"),
    }
)
"""Layers of EfficientNet and of our heads, and those of other convolutional backbones: they compute, and do no more."""

_CLASSES: dict[str | None, frozenset[str] | re.Pattern[str]] = {
    "keras": frozenset({"DTypePolicy", "Sequential", "Functional"}),
    "keras.src.models.functional": frozenset({"Functional"}),
    "keras.src.models.sequential": frozenset({"Sequential"}),
    "keras.layers": LAYERS,
    "keras.initializers": re.compile("[A-Z][A-Za-z]+"),
    "keras.regularizers": re.compile("[A-Z][A-Za-z0-9]+"),
    "keras.constraints": re.compile("[A-Z][A-Za-z]+"),
    None: frozenset({"__keras_tensor__"}),
}
"""Module -> names of its classes that may occur; the modules of initial values and of penalties hold no others."""


def check_network_archive(file: Path) -> None:
    """Check a network's file, so that reading it makes only known objects of Keras and runs no code of the file's.

    Raises:
        Refused: it is no such archive, or its configuration names anything else, such as a Lambda layer.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if set(names) != _MEMBERS or len(names) != len(_MEMBERS):
                others = ascii(", ".join(sorted(set(names) ^ _MEMBERS)) or "a file twice")[:200]
                raise Refused(f"{file.name}: expected {', '.join(sorted(_MEMBERS))} in it; differs in {others}")
            for member in members:
                limit = _MAX_WEIGHTS_BYTES if member.filename.endswith(".h5") else _MAX_CONFIG_BYTES
                if member.file_size > limit:
                    raise Refused(f"{file.name}: {member.filename} has {member.file_size:,} bytes; at most {limit:,}")
            config = json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, NotImplementedError, EOFError) as error:
        raise Refused(f"{file.name} is no network that Keras has saved: {error}") from None
    if not isinstance(config, dict) or config.get("class_name") not in {"Functional", "Sequential"}:
        raise Refused(f"{file.name}: its configuration is not that of a network of layers")
    for found in _list_objects(config):
        _check_object(found, file.name)


def _list_objects(config: object) -> Iterator[dict[str, object]]:
    """Yields whatever in a configuration Keras might make an object of."""
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if not value.keys().isdisjoint({"class_name", "registered_name", "module", "spec_name"}):
                yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check_object(found: dict[str, object], file: str) -> None:
    module, name, registered = found.get("module"), found.get("class_name"), found.get("registered_name")
    known = _CLASSES.get(module, frozenset()) if module is None or isinstance(module, str) else frozenset()
    is_known = isinstance(name, str) and (
        name in known if isinstance(known, frozenset) else known.fullmatch(name) is not None
    )
    if not is_known or registered not in (None, name):
        shown = ascii(f"{module}.{name}" + (f" ({registered})" if registered not in (None, name) else ""))[1:-1]
        raise Refused(
            f"{file}: its configuration names {shown[:160]}, which is none of the layers that an image "
            "classifier is made of here; a network with a Lambda layer, with code or with classes of its own cannot "
            "be registered"
        )
