from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.training.examples import Examples, feature_statistics, iterate_batches
from ml.training.fine_tuning import unfreeze_top
from ml.training.head_fitting import _compile_head, _compile_steps
from ml.training.presets import load_preset
from ml.training.sampling import class_weights, effective_class_prior, sample_epoch

DEMO = load_preset("demo").subtype


def recipe(**changes):
    other = {section: getattr(DEMO, section).model_copy(update=values) for section, values in changes.items()}
    return DEMO.model_copy(update=other)


def test_class_weights_by_hand():
    # 1/sqrt of 4 and 1 images: 0.5 and 1, scaled so that the mean over the five images is 1.
    truth = np.array([0, 0, 0, 0, 1])
    assert class_weights(truth, "sqrt") == pytest.approx({0: 5 / 6, 1: 5 / 3})
    assert class_weights(truth, "balanced") == pytest.approx({0: 5 / 8, 1: 5 / 2})
    assert class_weights(truth, "none") == {0: 1, 1: 1}


def test_shares_as_sampling_and_weights_show_them():
    truth = np.array([0] * 16 + [1] * 4)
    assert effective_class_prior(
        truth, recipe(imbalance={"sampling": "sqrt", "class_weights": "none"})
    ) == pytest.approx({0: 2 / 3, 1: 1 / 3})
    assert effective_class_prior(truth, recipe(imbalance={"class_weights": "balanced"})) == pytest.approx(
        {0: 0.5, 1: 0.5}
    )
    assert effective_class_prior(truth, recipe(imbalance={"class_weights": "none"})) == pytest.approx({0: 0.8, 1: 0.2})


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.sampled_from(["none", "sqrt"]), st.integers(0, 5))
def test_an_epoch_has_as_many_images_as_there_are(drawn, sampling, epoch):
    truth = np.array(drawn)
    taken = sample_epoch(truth, sampling, 0, epoch)
    assert len(taken) == len(truth)
    assert np.array_equal(taken, sample_epoch(truth, sampling, 0, epoch))
    if sampling == "none":
        assert sorted(taken) == list(range(len(truth)))
        return
    for label in set(drawn):
        times = np.bincount(taken, minlength=len(truth))[truth == label]
        assert times.max() - times.min() <= 1
    roots = np.sqrt(np.bincount(truth, minlength=4))
    wanted = roots / roots.sum() * len(truth)
    assert np.abs(np.bincount(truth[taken], minlength=4) - wanted).max() <= 1


def examples(n: int = 10, views: int = 1) -> Examples:
    return Examples(
        "subtype",
        DEMO,
        np.arange(n) % 8,
        np.zeros((views, n, 1280), "f4"),
        np.full(n, views),
        lambda rows: np.zeros((len(rows), 224, 224, 3), "u1"),
        [str(k) for k in range(n)],
    )


def test_an_epoch_has_its_own_order_wherever_one_begins():
    def batches(epochs):
        return [rows.tolist() for _, rows, *_ in iterate_batches(examples(), np.arange(10), 0, epochs, 4)]

    from_start, resumed = batches(range(4)), batches(range(2, 4))
    assert [len(batch) for batch in from_start] == [4, 4, 2] * 4
    assert resumed == from_start[6:]
    orders = [[*chain(*from_start[k : k + 3])] for k in (0, 3, 6, 9)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_an_epoch_takes_one_view_of_each_and_all_in_time():
    taken = [numbers for _, _, numbers, *_ in iterate_batches(examples(views=4), np.arange(10), 0, range(20), 10)]
    assert set(np.concatenate(taken)) == {0, 1, 2, 3}


def test_targets_and_weights_of_a_batch():
    ((_, rows, _, targets, weights),) = iterate_batches(examples(8), np.arange(8), 0, range(1), 8)
    assert (targets.argmax(axis=1) == rows).all()
    assert weights == pytest.approx(np.ones(8))


def test_statistics_are_numpys():
    features = np.random.default_rng(0).normal(50, 2, (1, 3000, 1280)).astype("f4")
    rows = np.arange(0, 3000, 2)
    mean, variance = feature_statistics(features, rows)
    assert np.allclose(mean, features[0, rows].mean(axis=0), rtol=1e-4)
    assert np.allclose(variance, features[0, rows].var(axis=0), rtol=1e-3)


def test_a_network_in_float16_scales_pixels_as_it_did():
    import keras

    pixels = x = keras.Input((8, 8, 3))
    scaled = keras.layers.Normalization()
    x = scaled(keras.layers.Rescaling(1 / 255)(x))
    network = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU(name="block7a")(x)))
    mean, variance, *count = scaled.get_weights()
    scaled.set_weights([mean + np.array([0.1, 0.2, 0.3]), variance * 0.05, *count])  # as ImageNet's weights have them
    scaled.finalize_state()
    shown = np.full((1, 8, 8, 3), 200, "f4")
    half = unfreeze_top(network, DEMO.fine_tuning, mixed=True)
    assert half.layers[-1].compute_dtype == "float16"
    assert np.asarray(half(shown)) == pytest.approx(np.asarray(network(shown)), rel=2e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_head_learns_as_with_the_optimizer_of_keras(decay):
    import keras

    spec = recipe(training={"weight_decay": decay, "batch_size": 8}, head={"dropout": 0.0, "standardize": False})
    ours = _compile_head("subtype", spec)
    theirs = keras.models.clone_model(ours)
    theirs.set_weights(ours.get_weights())
    rate = spec.training.learning_rate
    optimizer = keras.optimizers.AdamW(rate, weight_decay=decay) if decay else keras.optimizers.Adam(rate)
    theirs.compile(optimizer, loss=ours.loss)
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(40, 1280)).astype("f4"), np.eye(8, dtype="f4")[rng.integers(0, 8, 40)]
    before = ours.get_weights()
    _compile_steps(ours, 8)(features, targets, np.ones(40, "f4"))
    for start in range(0, 40, 8):
        theirs.train_on_batch(features[start : start + 8], targets[start : start + 8])
    for mine, other, was in zip(ours.get_weights(), theirs.get_weights(), before, strict=True):
        moved = np.linalg.norm(other - was)
        assert moved > 0
        assert np.linalg.norm(mine - other) < 1e-4 * moved
    for mine, other in zip(ours.optimizer.variables, theirs.optimizer.variables, strict=True):
        assert np.asarray(mine) == pytest.approx(np.asarray(other), rel=1e-3, abs=1e-7)
