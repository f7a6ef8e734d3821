"""Pictures of two patients that look the same, within a source and across the sources of a training set."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ml.data.near_copies import PAIRS_SHOWN, find_near_copies

# Few hashes a few bits apart, so that many are near.
_hashes = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 3, 7, 2**63, 2**64 - 1])
_pictures = st.lists(st.tuples(st.lists(_hashes, min_size=8, max_size=8), st.sampled_from("pqr")), max_size=6)


def write(hashes: list[int]) -> str:
    return "".join(f"{one:016x}" for one in hashes)


@given(_pictures, st.integers(0, 64), st.none() | st.integers(0, 6), st.booleans())
def test_pairs_that_look_alike_are_those_of_brute_force(pictures, distance: int, boundary, one_hash: bool) -> None:
    boundary = None if boundary is None else min(boundary, len(pictures))
    looks = [hashes[:1] if one_hash else hashes for hashes, _ in pictures]
    patients = [patient for _, patient in pictures]
    expected = {
        (i, j, bits)
        for j, oriented in enumerate(looks)
        for i, (upright, *_) in enumerate(looks[:j])
        if patients[i] != patients[j]
        and (boundary is None or i < boundary <= j)
        and (bits := min((upright ^ one).bit_count() for one in oriented)) <= distance
    }
    pairs, shown = find_near_copies([write(one) for one in looks], patients, distance, boundary=boundary)
    assert (pairs, set(shown)) == (len(expected), expected)


def test_many_alike_pictures_are_counted_in_bounded_time() -> None:
    """As blank ones are: every pair looks the same."""
    count = 4000
    begin = time.monotonic()
    pairs, shown = find_near_copies(["0" * 128] * count, [f"p{n}" for n in range(count)], 6)
    assert (pairs, len(shown)) == (count * (count - 1) // 2, PAIRS_SHOWN)
    assert time.monotonic() - begin < 30
    pairs, _ = find_near_copies(["0" * 128] * count, [f"p{n}" for n in range(count)], 6, boundary=1000)
    assert pairs == 1000 * 3000


def test_one_hash_of_an_early_release_is_compared_with_every_orientation() -> None:
    rng = np.random.default_rng(0)
    oriented = [int(one) for one in rng.integers(0, 2**63, 8)]
    for turned in oriented:
        assert find_near_copies([write([turned]), write(oriented)], ["p", "q"], 0, boundary=1)[0] == 1
