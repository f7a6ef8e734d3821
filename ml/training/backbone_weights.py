"""The backbone, EfficientNetB0 without its top, and where its weights come from.

M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019 (arXiv:1905.11946).
The backbone takes float or uint8 pixels in [0, 255], (n, 224, 224, 3), normalises them inside, and returns globally
average-pooled features, float32 (n, 1280).
"""

import hashlib
import os
import socket
import sys
import tempfile
import zipfile
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import numpy as np
from cloudpathlib import S3Path
from filelock import FileLock
from numpy.typing import NDArray

from ml.core.devices import import_tensorflow_quietly
from ml.core.errors import StoreError, WeightsError
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.data.sources.demo import DRAWING_VERSION, MIN_PICTURES, draw_picture, plan_pictures
from ml.images.decoding import INPUT_SIZE, resize

if TYPE_CHECKING:
    import keras

FEATURE_SIZE = 1280
"""Length of the backbone's feature vector."""


IMAGENET_URL = "https://storage.googleapis.com/keras-applications/efficientnetb0_notop.h5"
"""Where Keras has the ImageNet weights from."""

_RANDOM_SEED = 20161
_RANDOM_SCALE = 0.1
_DOWNLOAD_TIMEOUT = 30.0  # seconds; Keras sets none of its own
_IMAGENET_HOST = urlsplit(IMAGENET_URL).netloc
_IMAGENET_FILE = IMAGENET_URL.rpartition("/")[2]
_IMAGENET_MD5 = "50bc09e76180e00e4465e1a485ddc09d"  # as Keras' own application states it
_IMAGENET_STDDEV_RGB = (0.229, 0.224, 0.225)


class Weights(NamedTuple):
    """Backbone weights as they lie in the store."""

    id: str
    kind: str
    """``imagenet``, ``file`` or ``random``."""

    @property
    def pretrained(self) -> bool:
        """Whether they were learnt from anything."""
        return self.kind != "random"


def resolve_weights(wanted: str, store: Store, *, or_random: bool = False) -> Weights:
    """Bring the wanted weights into the store, once, as a backbone that stages and models load from there.

    Args:
        wanted: ``imagenet`` (Keras downloads them), ``random``, or the path or URI of a file: ``.h5`` is read as Keras'
            own no-top file for EfficientNetB0, ``.keras`` as a whole backbone.
        store: where they are kept.
        or_random: take random weights where ``imagenet`` cannot be downloaded, and say so loudly.

    Raises:
        WeightsError: they cannot be downloaded or read, or do not fit the network.
    """
    recipe = [_RANDOM_SEED, _RANDOM_SCALE, DRAWING_VERSION] if wanted == "random" else None
    inputs = {"wanted": wanted, "file": _file_hash(wanted), "recipe": recipe}
    known = store.memo("weights", inputs)
    if known and store.exists(known["id"]):
        return Weights(known["id"], known["kind"])
    try:
        backbone, kind = _load(wanted)
    except _CannotDownload as error:
        if not or_random:
            raise
        say("=" * 100)
        say("RANDOM BACKBONE WEIGHTS: " + str(error))
        say("This preset goes on with a backbone that has learnt nothing. Its models are for trying the workflow only.")
        say("=" * 100)
        return resolve_weights("random", store)
    weights = Weights(_keep(backbone, kind, wanted, store), kind)
    store.set_memo("weights", inputs, {"id": weights.id, "kind": weights.kind})
    return weights


def look_up_weights(weights: str, store: Store) -> Weights:
    """Weights that are in the store already, by their id.

    Raises:
        StoreError: they are not.
    """
    if not weights.startswith("weights-"):
        raise StoreError(f"{weights!r} is no id of weights; the stage weights prints one")
    return Weights(weights, store.meta(weights)["kind"])


def fetch_weights(wanted: str, store: Store, *, or_random: bool) -> Json:
    """Bring the wanted weights into the store (the ``weights`` stage), so that later stages need no way out for them.

    Returns:
        ``{weights, kind, pretrained, sha256, from}``.

    Raises:
        WeightsError: see :func:`resolve_weights`.
    """
    found = resolve_weights(wanted, store, or_random=or_random)
    meta = store.meta(found.id)
    return {
        "weights": found.id,
        "kind": found.kind,
        "pretrained": found.pretrained,
        "sha256": meta["sha256"],
        "from": meta["from"],
    }


def load_backbone(weights: str, store: Store) -> "keras.Model":
    """The backbone with these weights (an id that :func:`resolve_weights` gave), frozen.

    Raises:
        StoreError: there are no such weights, or they are damaged.
    """
    import_tensorflow_quietly()
    import keras

    recorded, file = store.meta(weights)["sha256"], store.file(weights, "backbone.keras")
    advice = f"remove {store.uri(store.object_key(weights))} and run: weights"
    try:
        backbone = keras.saving.load_model(file, compile=False)
    except (ValueError, OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"{weights} is damaged: {type(error).__name__} on reading it; {advice}") from None
    if _hash_of(backbone) != recorded:
        raise StoreError(f"{weights} is damaged: it holds other weights than were recorded; {advice}")
    backbone.trainable = False
    return backbone


class _CannotDownload(WeightsError):
    def __init__(self, error: object) -> None:
        reason = " ".join(str(error).split())
        super().__init__(
            f"ImageNet weights cannot be downloaded from {_IMAGENET_HOST} ({reason}). Where there is no way out, put "
            f"Keras' {_IMAGENET_FILE} on disk or in the store and set BREAKHIS_WEIGHTS to its path or URI, or set it "
            "to 'random' to try things."
        )


def _load(wanted: str) -> tuple["keras.Model", str]:
    if wanted == "imagenet":
        _check_download()
    import_tensorflow_quietly()
    if wanted == "random":
        return _random(), "random"
    if wanted == "imagenet":
        return _imagenet(), "imagenet"
    return _from_file(wanted), "file"


def _empty() -> "keras.Model":
    import keras

    return keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(INPUT_SIZE, INPUT_SIZE, 3), pooling="avg", name="efficientnetb0"
    )


def imagenet_cache_file() -> Path:
    """Where Keras keeps the ImageNet weights once it has downloaded them."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models" / _IMAGENET_FILE


def _check_download() -> None:
    """Find out in a moment that there is no way to the weights, rather than after TensorFlow's import.

    Raises:
        _CannotDownload: they are not in Keras' cache, and their host cannot be reached.
    """
    if imagenet_cache_file().is_file() or "https" in getproxies():
        return
    try:
        socket.create_connection((_IMAGENET_HOST, 443), timeout=_DOWNLOAD_TIMEOUT / 3).close()
    except OSError as error:
        raise _CannotDownload(error) from None


def _imagenet() -> "keras.Model":
    import keras

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        # One at a time: Keras downloads to where the next process finds it, half there.
        with _download_lock(), redirect_stdout(sys.stderr):  # Keras prints its progress where our result goes
            file = keras.utils.get_file(_IMAGENET_FILE, IMAGENET_URL, cache_subdir="models", file_hash=_IMAGENET_MD5)
    except Exception as error:  # Keras raises a bare Exception for a refused download
        raise _CannotDownload(error) from None
    finally:
        socket.setdefaulttimeout(before)
    return _from_h5(Path(file), "imagenet")


def _download_lock() -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"breakhis-imagenet-{os.getuid()}.lock")


def _from_file(wanted: str) -> "keras.Model":
    local = find_weights_file(wanted)
    if local is None:
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: no such file (or one of: imagenet, random)")
    if local.suffix == ".h5":
        return _from_h5(local, wanted)
    if local.suffix != ".keras":
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: expected a no-top .h5 or a .keras file")
    import keras

    try:
        backbone = keras.saving.load_model(local, compile=False)
    except (ValueError, OSError) as error:
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: not a Keras model: {str(error).splitlines()[0]}") from None
    if backbone.input_shape != (None, INPUT_SIZE, INPUT_SIZE, 3) or backbone.output_shape != (None, FEATURE_SIZE):
        raise WeightsError(
            f"BREAKHIS_WEIGHTS: {wanted}: takes {backbone.input_shape} and returns {backbone.output_shape}; "
            f"expected (None, {INPUT_SIZE}, {INPUT_SIZE}, 3) and (None, {FEATURE_SIZE})"
        )
    return backbone


def _from_h5(file: Path, wanted: str) -> "keras.Model":
    import keras

    backbone = _empty()
    try:
        backbone.load_weights(str(file))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: not EfficientNetB0's no-top weights: {reason}") from None
    # With weights="imagenet" Keras divides by sqrt(stddev) once more, in a layer that it leaves out when the very same
    # file is given by path (github.com/tensorflow/tensorflow/issues/49930). The variance is where that belongs.
    # By type: Keras numbers the names of such layers through the whole process.
    normalization = next(layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization))
    mean, variance, *count = normalization.get_weights()
    normalization.set_weights([mean, variance * np.array(_IMAGENET_STDDEV_RGB, variance.dtype), *count])
    normalization.finalize_state()
    return backbone


def _random() -> "keras.Model":
    """Untrained weights that pass something on of what the pictures hold.

    BatchNorm statistics are taken of drawn tissue: with those of a fresh network features hardly vary at all (1e-6).
    Scales are small: at 1, sixteen random blocks in a row scramble a picture until a head finds nothing in it; at 0.1
    each activation works where it is nearly linear.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(_RANDOM_SEED)
    backbone = _empty()
    norms = [layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    usual = [layer.momentum for layer in norms]
    for layer in norms[:-1]:
        layer.gamma.assign(np.full(layer.gamma.shape, _RANDOM_SCALE))
    for layer in norms:
        layer.momentum = 0.0  # one pass in training mode then leaves exactly this batch's statistics
    # As a graph, which lets go of each layer's output once it is used; eagerly it would hold 4 GB of them.
    tf.function(backbone)(_calibration_pictures(), training=True)
    for layer, momentum in zip(norms, usual, strict=True):
        layer.momentum = momentum
    return backbone


def _calibration_pictures() -> NDArray[np.float32]:
    """Drawn tissue, one picture of every third slide folder: (28, 224, 224, 3) in [0, 255].

    Statistics of anything less alike, such as noise, let the features of real tissue grow by two orders.
    """
    drawn = [resize(draw_picture(picture, _RANDOM_SEED)) for picture in plan_pictures(MIN_PICTURES)[::3]]
    return np.stack(drawn).astype(np.float32)


def _keep(backbone: "keras.Model", kind: str, wanted: str, store: Store) -> str:
    sha256 = _hash_of(backbone)
    meta: Json = {"kind": kind, "from": wanted, "sha256": sha256, "network": "EfficientNetB0"}
    return store.create("weights", [kind, sha256], meta, lambda folder: backbone.save(folder / "backbone.keras"))


def _file_hash(wanted: str) -> str | None:
    if wanted in {"imagenet", "random"}:
        return None
    local = find_weights_file(wanted)
    return hashlib.sha256(local.read_bytes()).hexdigest() if local else None  # _load says that there is none


def _hash_of(backbone: "keras.Model") -> str:
    hasher = hashlib.sha256()
    for array in backbone.get_weights():
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def find_weights_file(wanted: str) -> Path | None:
    """The file that a path, file:// or s3:// address names, downloaded where it must be; None if there is none.

    Raises:
        WeightsError: it cannot be read.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from cloudpathlib.exceptions import CloudPathException

    try:
        if wanted.startswith("s3://"):
            path = S3Path(wanted)
            return Path(path.fspath) if path.is_file() else None
        local = Path(unquote(wanted.removeprefix("file://"))) if wanted.startswith("file://") else Path(wanted)
        return local.expanduser() if local.expanduser().is_file() else None
    except (OSError, BotoCoreError, ClientError, CloudPathException) as error:
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: cannot be read: {error}") from None
