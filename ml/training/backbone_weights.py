"""The backbone, EfficientNetB0 without its top, and where its weights come from.

M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019 (arXiv:1905.11946).
The backbone takes float or uint8 pixels in [0, 255], (n, 224, 224, 3), normalises them inside, and returns globally
average-pooled features, float32 (n, 1280).
"""

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import numpy as np
from cloudpathlib import S3Path
from numpy.typing import NDArray

from ml.core.devices import import_tensorflow_quietly
from ml.core.errors import StoreError, TryAgain, WeightsError
from ml.core.hashes import hash_file
from ml.core.messages import quote_value
from ml.core.names import expand_home
from ml.core.progress import say, warn
from ml.core.store import Json, Store
from ml.core.stored_json import describe_damage
from ml.data.sources.demo import DRAWING_VERSION, MIN_PICTURES, draw_picture, plan_pictures
from ml.data.sources.speed_limit import TooSlow, limit_speed
from ml.images.decoding import INPUT_SIZE, resize
from ml.training.imagenet_download import DownloadError, check_download, fetch_imagenet_file

if TYPE_CHECKING:
    import keras

FEATURE_SIZE = 1280
"""Length of the backbone's feature vector."""

_RANDOM_SEED = 20161
_RANDOM_SCALE = 0.1
_IMAGENET_STDDEV_RGB = (0.229, 0.224, 0.225)


class Weights(NamedTuple):
    """Backbone weights in the store."""

    id: str
    kind: str
    """``imagenet``, ``file`` or ``random``."""

    @property
    def pretrained(self) -> bool:
        """Whether the weights were trained on any data."""
        return self.kind != "random"


def resolve_weights(wanted: str, store: Store, *, allow_random: bool = False) -> Weights:
    """Put the wanted weights into the store, once, as a backbone that stages and models load from there.

    Args:
        wanted: ``imagenet`` (Keras' file, downloaded), ``random``, or the path or URI of a file: ``.h5`` is read as
            Keras' own no-top file for EfficientNetB0, ``.keras`` as a whole backbone.
        store: the store that keeps them.
        allow_random: use random weights if ``imagenet`` cannot be downloaded, with a warning.

    Raises:
        WeightsError: the weights cannot be downloaded or read, or do not fit the network.
    """
    recipe = [_RANDOM_SEED, _RANDOM_SCALE, DRAWING_VERSION] if wanted == "random" else None
    inputs = {"wanted": wanted, "file": _hash_file(wanted), "recipe": recipe}
    known = store.memo("weights", inputs)
    if known and store.exists(known["id"]):
        return Weights(known["id"], known["kind"])
    try:
        backbone, kind = _load(wanted)
    except DownloadError as error:
        if not allow_random:
            raise
        say("=" * 100)
        warn(f"RANDOM BACKBONE WEIGHTS: {error}")
        warn("This preset goes on with an untrained backbone. Its models are for trying the workflow only.")
        say("=" * 100)
        return resolve_weights("random", store)
    weights = Weights(_store_backbone(backbone, kind, wanted, store), kind)
    store.set_memo("weights", inputs, {"id": weights.id, "kind": weights.kind})
    return weights


def look_up_weights(weights: str, store: Store) -> Weights:
    """Returns the weights with this id from the store.

    Raises:
        StoreError: the store has no such weights.
    """
    if not weights.startswith("weights-"):
        raise StoreError(f"{quote_value(weights)} is not an id of weights; run: weights, which prints one")
    return Weights(weights, store.meta(weights)["kind"])


def fetch_weights(wanted: str, store: Store, *, allow_random: bool) -> Json:
    """Put the wanted weights into the store (the ``weights`` stage), so that later stages need no network access.

    Args:
        wanted: see :func:`resolve_weights`.
        store: the store that keeps them.
        allow_random: use random weights if ``imagenet`` cannot be downloaded.

    Returns:
        ``{weights, kind, pretrained, sha256, from}``.

    Raises:
        WeightsError: see :func:`resolve_weights`.
    """
    weights = resolve_weights(wanted, store, allow_random=allow_random)
    meta = store.meta(weights.id)
    return {
        "weights": weights.id,
        "kind": weights.kind,
        "pretrained": weights.pretrained,
        "sha256": meta["sha256"],
        "from": meta["from"],
    }


def load_backbone(weights: str, store: Store) -> "keras.Model":
    """Load the backbone with these weights, by their id in the store; all its layers are frozen.

    Raises:
        StoreError: the store has no such weights, or they are damaged.
    """
    import_tensorflow_quietly()
    import keras

    recorded, file = store.meta(weights)["sha256"], store.file(weights, "backbone.keras")
    uri = store.uri(f"{store.object_key(weights)}/backbone.keras")
    try:
        backbone = keras.saving.load_model(file, compile=False)
    except (ValueError, OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise describe_damage(uri, f"{type(error).__name__} on reading it") from None
    if _hash_weights(backbone) != recorded:
        raise describe_damage(uri, "it holds other weights than were recorded")
    backbone.trainable = False
    return backbone


def _load(wanted: str) -> tuple["keras.Model", str]:
    if wanted == "imagenet":
        check_download()
    import_tensorflow_quietly()
    if wanted == "random":
        return _random(), "random"
    if wanted == "imagenet":
        return _read_h5(fetch_imagenet_file(), "imagenet"), "imagenet"
    return _read_file(wanted), "file"


def _build_backbone() -> "keras.Model":
    import keras

    return keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(INPUT_SIZE, INPUT_SIZE, 3), pooling="avg", name="efficientnetb0"
    )


def _read_file(wanted: str) -> "keras.Model":
    local = find_weights_file(wanted)
    if local is None:
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: no such file (or one of: imagenet, random)")
    if local.suffix == ".h5":
        return _read_h5(local, wanted)
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


def _read_h5(file: Path, wanted: str) -> "keras.Model":
    import keras

    backbone = _build_backbone()
    try:
        backbone.load_weights(str(file))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: not EfficientNetB0's no-top weights: {reason}") from None
    # With weights="imagenet" Keras divides by sqrt(stddev) once more, in a layer that it leaves out when the very same
    # file is given by path (github.com/tensorflow/tensorflow/issues/49930). That factor belongs to the variance.
    # Found by type: Keras numbers the names of such layers throughout the process.
    normalization = next(layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization))
    mean, variance, *count = normalization.get_weights()
    normalization.set_weights([mean, variance * np.array(_IMAGENET_STDDEV_RGB, variance.dtype), *count])
    normalization.finalize_state()
    return backbone


def _random() -> "keras.Model":
    """Returns a backbone with random weights whose features still depend on what a picture shows.

    BatchNorm statistics are those of drawn tissue: with the statistics of a fresh network, features hardly vary (1e-6).
    BatchNorm scales are small: at 1, sixteen random blocks in a row scramble a picture until a head finds nothing in
    it; at 0.1, each activation works where it is nearly linear.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(_RANDOM_SEED)
    backbone = _build_backbone()
    norms = [layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms[:-1]:
        layer.gamma.assign(np.full(layer.gamma.shape, _RANDOM_SCALE))
    for layer in norms:
        layer.momentum = 0.0  # so that one pass in training mode leaves exactly this batch's statistics
    # A graph frees each layer's output once it is used; eager execution would hold 4 GB of them.
    tf.function(backbone)(_calibration_pictures(), training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    return backbone


def _calibration_pictures() -> NDArray[np.float32]:
    """Returns drawn tissue, one picture of every third slide folder: float32 (28, 224, 224, 3) in [0, 255].

    With the statistics of less similar pictures, such as noise, the features of real tissue would be a hundred times as
    large.
    """
    drawn = [resize(draw_picture(picture, _RANDOM_SEED)) for picture in plan_pictures(MIN_PICTURES)[::3]]
    return np.stack(drawn).astype(np.float32)


def _store_backbone(backbone: "keras.Model", kind: str, wanted: str, store: Store) -> str:
    sha256 = _hash_weights(backbone)
    meta: Json = {"kind": kind, "from": wanted, "sha256": sha256, "network": "EfficientNetB0"}
    return store.create("weights", [kind, sha256], meta, lambda folder: backbone.save(folder / "backbone.keras"))


def _hash_file(wanted: str) -> str | None:
    if wanted in {"imagenet", "random"}:
        return None
    local = find_weights_file(wanted)
    return hash_file(local) if local else None  # _load reports the missing file


def _hash_weights(backbone: "keras.Model") -> str:
    hasher = hashlib.sha256()
    for array in backbone.get_weights():
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def find_weights_file(wanted: str) -> Path | None:
    """Returns the file at a path, file:// or s3:// address, downloaded if necessary; None if there is none.

    Raises:
        WeightsError: the file cannot be read.
        TryAgain: its server is too slow.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from cloudpathlib.exceptions import CloudPathException

    try:
        if wanted.startswith("s3://"):
            limit_speed()
            path = S3Path(wanted)
            return Path(path.fspath) if path.is_file() else None
        local = Path(unquote(wanted.removeprefix("file://"))) if wanted.startswith("file://") else Path(wanted)
        return expand_home(local) if expand_home(local).is_file() else None
    except TooSlow as error:
        raise TryAgain(f"BREAKHIS_WEIGHTS: {wanted}: its server {error}; try again") from None
    except (OSError, ValueError, BotoCoreError, ClientError, CloudPathException) as error:
        raise WeightsError(f"BREAKHIS_WEIGHTS: {wanted}: cannot be read: {error}") from None
