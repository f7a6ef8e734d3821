"""Training: the published recipe on cached features against the frozen backbone in every epoch, and its memory."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import mean

import numpy as np

from ml.core.settings import read_settings
from ml.core.store import Store
from ml.core.taxonomy import SIDES, TASKS, class_names
from ml.data.splits import look_up_sides, read_split
from ml.data.training_sets import read_dataset
from ml.evaluation.metrics import compute_weighted_metrics
from ml.images.augmentation import plan_shared_views
from ml.images.decoding import INPUT_SIZE
from ml.training.checkpoints import Checkpoint
from ml.training.features import extract_features
from ml.training.presets import Preset, load_preset
from ml.training.procedure import collect_scores, fit_and_calibrate, prepare_training_data
from tests.benchmarks.measure import Figure, Run, breakhis, watched
from tests.benchmarks.replica import MAX_PICTURES, Replica
from tests.helpers import made_up

_WORKERS = 2
_EPOCHS = 20
_WANTED = {1: 35, 4: 15}  # views -> times as fast
_TURNS = 2
_SUBSET = 1_280  # pictures that an epoch with the backbone is measured on: of few, Keras' start of one is a few percent
_FEW = 1_000
_SEEDS = 5
_MIB = 2**20


def figures(replica: Replica) -> list[Figure]:
    """All figures of this page, with random weights, which cost what any weights do."""
    with replica.home(_WORKERS, WEIGHTS="random", BACKEND="openvino") as (home, environment):
        breakhis("ingest", "replica", environment=environment)
        dataset = breakhis("assemble", "replica", environment=environment).result["dataset"]
        split = breakhis("split", dataset, environment=environment).result
        breakhis("weights", environment=environment)
        module = ["-m", "tests.benchmarks.training"]
        learnt_from = (dataset, split["split"])
        learnt, held_out, tested = (split[side]["images"] for side in SIDES)
        naive, ours = list[Run](), dict[int, list[Run]]()
        for turn in range(_TURNS):
            naive.append(watched([*module, "naive", dataset], environment))
            for views in _WANTED:
                # It would find pixels, a view and the converted network of the one before: they are taken away, as all
                # is to be counted.
                for folder in (*(home / "store" / "objects" / "caches").glob("*"), home / "cache" / "openvino"):
                    if folder.exists():
                        folder.rename(home / f"gone-{turn}-{views}-{folder.name}")
                ours.setdefault(views, []).append(watched([*module, "ours", str(views), *learnt_from], environment))
        again = watched([*module, "ours", "4", *learnt_from], environment)
        store = Store((home / "store").as_uri())
        rows = read_dataset(dataset, store)
        few = made_up.create_dataset(store, rows.iloc[:: max(1, len(rows) // _FEW)].iloc[:_FEW], ledger="few")
        few_split = breakhis("split", few, environment=environment).result["split"]
        compared_views = watched([*module, "views", few, few_split], environment).result
        smaller = watched([*module, "ours", "4", few, few_split], environment)
    took = {name: mean(run.result[name] for run in naive) for name in naive[0].result}
    start = mean(run.seconds for run in naive) - took["measured"]  # and end
    decoding = (learnt + held_out + tested) * took["decode"]
    epochs = sum(_EPOCHS * (learnt * took[task] + held_out * took["predict"]) for task in TASKS)
    whole = start + decoding + epochs + len(TASKS) * tested * took["predict"]
    rates = ", ".join(f"{1 / took[task]:.0f}" for task in TASKS)
    seconds = {views: mean(run.seconds for run in runs) for views, runs in ours.items()}
    parts = {
        views: ", ".join(f"{part} {mean(run.result[part] for run in runs):.1f}" for part in ("extraction", "learning"))
        for views, runs in ours.items()
    }
    auc = {int(views): np.array(found) for views, found in compared_views["auc"].items()}
    compared = (
        f"backbone in each epoch: {whole:.0f} s, of it start and end {start:.0f}, decoding {decoding:.0f}; "
        f"by {took['pictures']:,.0f} pictures {rates} images/s learnt, {1 / took['predict']:.0f} predicted, "
        f"times {learnt:,} and {held_out:,}; {tested:,} tested"
    )
    grown = (again.memory - smaller.memory) / _MIB
    return [
        *(
            Figure(
                f"paper, both models, {_EPOCHS} epochs each, {views} view(s)",
                f"{seconds[views]:.1f} s, mean of {_TURNS}: {parts[views]}",
                compared,
                whole / seconds[views],
                f"at least {wanted}",
                whole >= wanted * seconds[views],
            )
            for views, wanted in _WANTED.items()
        ),
        Figure(
            f"paper, binary, {_FEW:,} images: test AUC with cached views, {_SEEDS} seeds",
            ", ".join(f"{views}: {found.mean():.3f} (sd {found.std(ddof=1):.3f})" for views, found in auc.items()),
            f"{_EPOCHS} views, one for each epoch, as layers in the network would make them; from 4 to {_EPOCHS}: "
            f"{(auc[_EPOCHS] - auc[4]).mean():+.3f} (sd {(auc[_EPOCHS] - auc[4]).std(ddof=1):.3f})",
        ),
        Figure(
            f"head training from cached features, {learnt + held_out:,} images",
            f"{again.memory / _MIB:.0f} MiB anonymous",
            f"{smaller.result['images']:,} images: {smaller.memory / _MIB:.0f} MiB",
            again.memory / smaller.memory,
            "below 3 GiB, 150 MiB more at the most",
            (again.memory < 3 * 2**30 and grown < 150) if replica.images >= MAX_PICTURES else None,
        ),
    ]


def _preset(views: int) -> Preset:
    """``paper`` with as many views for both models."""
    preset = load_preset("paper")
    changed = preset.binary.views.model_copy(update={"count": views, "rare_count": views}).model_dump()
    if views == 1:
        changed["augmentation"] = None
    changes = {"views": {**changed, "augmentation": preset.binary.views.augmentation if views > 1 else None}}
    return preset.with_changes("binary", **changes).with_changes("subtype", **changes)


def _ours(views: int, dataset: str, split: str) -> dict[str, float]:
    """Extraction and both models' learning, down to the predictions of the test side."""
    configuration = read_settings()
    store, preset = Store(configuration.store), _preset(views)
    rows, dealt = read_dataset(dataset, store), read_split(split, store)
    begin = time.perf_counter()
    specs = [preset.binary.views, preset.subtype.views]
    plan = [
        (view, rows.loc[wanted, "pixel_sha256"].tolist())
        for view, wanted in plan_shared_views(specs, rows, look_up_sides(rows, dealt))
    ]
    extract_features(dataset, preset, store, configuration, plan=plan)
    extracted = time.perf_counter()
    for task in TASKS:
        with prepare_training_data(task, dataset, dealt, preset, store, configuration) as data:
            checkpoint = Checkpoint(store, f"bench-{data.inputs_digest}")
            with checkpoint.alive():
                fit_and_calibrate(task, preset.recipe(task), 0, data, checkpoint, store)
            checkpoint.forget()
    learnt = time.perf_counter()
    return {
        "extraction": extracted - begin,
        "learning": learnt - extracted,
        "images": len(rows),
    }


def _views(dataset: str, split: str) -> dict[str, dict[int, list[float]]]:
    """What the binary model reaches on the test side with so many cached views, by seed."""
    configuration, dealt = read_settings(), read_split(split, Store(read_settings().store))
    store, auc = Store(configuration.store), dict[int, list[float]]()
    for views in (1, 4, _EPOCHS):
        preset = _preset(views)
        with prepare_training_data("binary", dataset, dealt, preset, store, configuration) as data:
            for seed in range(_SEEDS):
                checkpoint = Checkpoint(store, f"bench-{data.inputs_digest}-{seed}")
                with checkpoint.alive():
                    learnt = fit_and_calibrate("binary", preset.recipe("binary"), seed, data, checkpoint, store)
                checkpoint.forget()
                scored = collect_scores("binary", learnt, data)["test"]
                found = compute_weighted_metrics(scored, np.ones((1, len(scored.truth))))["roc_auc"]
                auc.setdefault(views, []).append(float(found[0]))
    return {"auc": auc}


def _pictures(paths: list[str]) -> "tf.data.Dataset":  # noqa: F821
    import tensorflow as tf

    def load(path: object) -> object:
        return tf.image.resize(tf.io.decode_png(tf.io.read_file(path), channels=3), (INPUT_SIZE, INPUT_SIZE))

    return tf.data.Dataset.from_tensor_slices(paths).map(load, num_parallel_calls=tf.data.AUTOTUNE)


def _naive(dataset: str) -> dict[str, float]:
    """What one would write with TensorFlow and Keras alone, on a few pictures, in memory once they are decoded.

    Returns:
        seconds a picture: to ``decode`` it, to learn from it by task, and to ``predict``; and seconds that all this
        took, ``measured`` on so many ``pictures``, so that what is left of the process's time is its start and end.
    """
    import keras
    import tensorflow as tf

    from ml.training.backbone_weights import load_backbone, resolve_weights

    store, preset, took, measured = Store(read_settings().store), load_preset("paper"), dict[str, float](), 0.0
    predictions = list[float]()

    def seconds(run: Callable[[], object]) -> float:
        nonlocal measured
        begin = time.perf_counter()
        run()
        measured += time.perf_counter() - begin
        return (time.perf_counter() - begin) / len(rows)

    rows = read_dataset(dataset, store).iloc[:_SUBSET]
    paths = [str(store.local(store.blob_key(sha256))) for sha256 in rows["sha256"]]
    decoded: list[object] = []
    took["decode"] = seconds(lambda: decoded.extend(batch.numpy() for batch in _pictures(paths).batch(32)))
    pixels = np.concatenate(decoded)
    for task in TASKS:
        backbone = load_backbone(resolve_weights("random", store).id, store)
        names = class_names(task)
        truth = np.array([names.index(name) for name in rows["label" if task == "binary" else "subtype"]])
        inputs = x = keras.Input((INPUT_SIZE, INPUT_SIZE, 3))
        if task == "binary":
            for layer in (
                keras.layers.RandomFlip(),
                keras.layers.RandomBrightness(0.1),
                keras.layers.RandomContrast(0.1),
            ):
                x = layer(x)
        x = keras.layers.Dense(512, activation="relu")(backbone(x, training=False))
        x = keras.layers.Dropout(0.5)(x)
        outputs = keras.layers.Dense(1 if task == "binary" else len(names))(x)
        network = keras.Model(inputs, outputs)
        loss: keras.losses.Loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if task == "binary":
            loss = keras.losses.BinaryCrossentropy(from_logits=True)
        recipe = preset.recipe(task).training
        network.compile(keras.optimizers.Adam(recipe.learning_rate), loss=loss, jit_compile=False)
        data = tf.data.Dataset.from_tensor_slices((pixels, truth)).batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE)
        network.fit(data.take(2), verbose=0)  # traces it
        network.predict(pixels[:32], verbose=0)
        learning = partial(network.fit, data, verbose=0)
        predicting = partial(network.predict, pixels, batch_size=32, verbose=0)
        took[task] = seconds(learning)
        predictions.append(seconds(predicting))
    took["predict"] = mean(predictions)
    return {**took, "pictures": len(rows), "measured": measured}


def _main(what: str, *arguments: str) -> None:
    if what == "naive":
        print(json.dumps(_naive(*arguments)))
    elif what == "views":
        print(json.dumps(_views(*arguments)))
    else:
        views, dataset, split = arguments
        print(json.dumps(_ours(int(views), dataset, split)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
