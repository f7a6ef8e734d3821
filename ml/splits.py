"""Splits by case into train, validation and test, kept in an append-only ledger.

A case never changes sides once it is in the ledger, so a champion and a later challenger can always be compared on the
same untouched test cases. New cases are allotted around the frozen ones.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.errors import Conflict, DataError, StoreError
from ml.store import Json, Store, digest
from ml.taxonomy import SIDES, SUBTYPES
from ml.training_sets import read_dataset

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.70, 0.15, 0.15)
"""Wanted share of the images on each side."""

METHOD = "allocator"

_RESTARTS = 16
_NO_TRAIN, _NO_TEST, _NO_VALIDATION = 1e6, 1e5, 1e1
"""What it costs to leave a class without a case on a side. Without train it cannot be learnt, without test it cannot be
measured; without validation it only takes no part in choosing the threshold."""


@dataclass(frozen=True)
class Ledger:
    """Which side each case is on, and in which order the cases came.

    ``hash`` covers everything: each entry is chained to the one before it, so no entry can be altered unseen.
    """

    name: str
    entries: tuple[Json, ...] = ()

    @property
    def sides(self) -> dict[str, str]:
        """Case -> side."""
        return {case: side for entry in self.entries for case, side in entry["added"].items()}

    @property
    def hash(self) -> str:
        """SHA-256 over the whole chain; of an empty ledger, over its name."""
        return str(self.entries[-1]["hash"]) if self.entries else digest(self._header())

    def append(self, added: Mapping[str, str], dataset: str, seed: int) -> "Ledger":
        """A ledger with one entry more.

        Raises:
            DataError: one of the cases is in the ledger already.
        """
        again = sorted(added.keys() & self.sides.keys())
        if again:
            raise DataError(f"ledger {self.name!r}: case {again[0]} has its side already and cannot be given another")
        entry: Json = {"added": dict(sorted(added.items())), "dataset": dataset, "seed": seed}
        return Ledger(self.name, (*self.entries, {**entry, "hash": digest([self.hash, entry])}))

    def verify(self) -> "Ledger":
        """This ledger, if its chain of hashes holds.

        Raises:
            StoreError: an entry was edited, removed or moved.
        """
        checked = Ledger(self.name)
        for number, entry in enumerate(self.entries, start=1):
            checked = checked.append(entry["added"], entry["dataset"], entry["seed"])
            if checked.hash != entry["hash"]:
                raise StoreError(
                    f"ledgers/{self.name}.json: entry {number} does not fit its hash, so it was changed by hand; "
                    "restore the file from a backup: a split cannot be trusted after its ledger was edited"
                )
        return checked

    def _header(self) -> Json:
        return {"name": self.name, "method": METHOD, "group": "case", "fractions": list(FRACTIONS)}

    def to_json(self) -> Json:
        """The file in the store."""
        return {**self._header(), "entries": list(self.entries), "hash": self.hash}


def read_ledger(name: str, store: Store) -> tuple[Ledger, str | None]:
    """A ledger, verified, and its version tag for compare-and-set; an empty one where there is none yet.

    Raises:
        StoreError: the ledger was edited.
    """
    value, tag = store.read(f"ledgers/{name}.json")
    ledger = Ledger(name, tuple(value["entries"])) if value else Ledger(name)
    return ledger.verify(), tag


def split_dataset(dataset: str, store: Store) -> Json:
    """Put every case of a dataset on a side (the ``split`` stage); cases in the ledger keep theirs.

    Returns:
        ``{split, ledger, ledger_hash, method, not_estimable, train, validation, test}``; each side has ``images``,
        ``cases`` and both by subtype; ``not_estimable`` names the classes that have no case in test.

    Raises:
        DataError: too few cases for three sides.
        Conflict: other runs kept changing the ledger.
    """
    meta = store.meta(dataset)
    rows = read_dataset(dataset, store)
    if rows["patient"].nunique() < len(SIDES):
        raise DataError(f"{dataset}: {rows['patient'].nunique()} case(s); a split needs at least {len(SIDES)}")
    counts = {
        str(case): [int((group["subtype"] == subtype).sum()) for subtype in SUBTYPES]
        for case, group in rows.groupby("patient")
    }
    key = f"ledgers/{meta['ledger']}.json"
    for attempt in range(5):
        ledger, tag = read_ledger(meta["ledger"], store)
        new = sorted(counts.keys() - ledger.sides.keys())
        if not new:
            break
        sides = allocate(counts, ledger.sides, seed=int(meta["seed"]))
        ledger = ledger.append({case: sides[case] for case in new}, dataset, int(meta["seed"]))
        try:
            store.compare_and_set(key, ledger.to_json(), tag)
        except Conflict:
            if attempt == 4:
                raise
        else:
            break
    return _record(dataset, rows, ledger, store)


def read_split(split: str, store: Store) -> dict[str, str]:
    """Case -> side, as the split was made.

    Raises:
        StoreError: no such split.
    """
    return dict(store.meta(split)["sides"])


def sides_of(rows: "pd.DataFrame", split: Mapping[str, str]) -> NDArray[np.str_]:
    """The side of each row of a dataset.

    Raises:
        DataError: a case is missing in the split, or the same pixels lie on two sides.
    """
    missing = sorted(set(rows["patient"]) - split.keys())
    if missing:
        raise DataError(f"the split was made for another dataset: it does not know case {missing[0]}")
    sides = rows["patient"].map(split)
    leaks = sides.groupby(rows["pixel_sha256"]).nunique()
    if (leaks > 1).any():
        raise DataError(f"the same picture lies on two sides of the split: pixels {leaks.idxmax()}")
    return np.asarray(sides, dtype=np.str_)


def allocate(counts: Mapping[str, list[int]], frozen: Mapping[str, str], *, seed: int) -> dict[str, str]:
    """Give every case a side: 70/15/15 of the images, of all and of each class, and no class missing where avoidable.

    Steepest descent from several random starts: the best single move, or else the best swap of two cases, as long as
    one lowers the cost; the best end wins. The same arguments give the same sides.

    Args:
        counts: images of each class, by case.
        frozen: sides that must not change; cases that are not in ``counts`` are ignored.
        seed: of the starts.
    """
    cases = sorted(counts)
    images = np.array([counts[case] for case in cases], dtype=float)
    fixed = np.array([SIDES.index(frozen[case]) if case in frozen else -1 for case in cases])
    free = np.flatnonzero(fixed < 0)
    rng = np.random.default_rng(seed)
    best: NDArray[np.int64] | None = None
    best_cost = np.inf
    for _ in range(_RESTARTS):
        start = np.where(fixed < 0, rng.choice(len(SIDES), size=len(cases), p=FRACTIONS), fixed)
        found, cost = _descend(start, free, images)
        if cost < best_cost:
            best, best_cost = found, cost
    assert best is not None
    return {case: SIDES[side] for case, side in zip(cases, best, strict=True)}


def _descend(
    sides: NDArray[np.int64], free: NDArray[np.int64], images: NDArray[np.float64]
) -> tuple[NDArray[np.int64], float]:
    # A row a case: its images by class, and a last column that counts it as one case.
    weights = np.hstack([images, np.ones((len(images), 1))])
    one_hot = np.eye(len(SIDES))
    totals = one_hot[sides].T @ weights  # (sides, classes + 1)
    cost = float(_costs(totals[None], totals)[0])
    pairs = np.array([(a, b) for i, a in enumerate(free) for b in free[i + 1 :]], dtype=np.int64).reshape(-1, 2)
    while True:
        a, to = (grid.ravel() for grid in np.meshgrid(free, np.arange(len(SIDES)), indexing="ij"))
        change = (one_hot[to] - one_hot[sides[a]])[:, :, None] * weights[a][:, None, :]
        costs = _costs(totals[None] + change, totals)
        if len(costs) and costs.min() < cost - 1e-12:
            best = int(costs.argmin())
            sides = sides.copy()
            sides[a[best]] = to[best]
        else:
            x, y = pairs[sides[pairs[:, 0]] != sides[pairs[:, 1]]].T
            change = (one_hot[sides[y]] - one_hot[sides[x]])[:, :, None] * (weights[x] - weights[y])[:, None, :]
            costs = _costs(totals[None] + change, totals)
            if not len(costs) or costs.min() >= cost - 1e-12:
                return sides, cost
            best = int(costs.argmin())
            sides = sides.copy()
            sides[[x[best], y[best]]] = sides[[y[best], x[best]]]
        totals = one_hot[sides].T @ weights
        cost = float(_costs(totals[None], totals)[0])


def _costs(trials: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cost of each of n trial allotments, given as per-side totals (n, sides, classes + 1); lower is better."""
    everything = totals.sum(axis=0)
    present = everything > 0
    present[-1] = False  # the column that counts cases
    wanted = np.array(FRACTIONS)[None, :, None]
    of_class = trials[:, :, present]
    missing = (of_class < 0.5).sum(axis=2) @ np.array([_NO_TRAIN, _NO_VALIDATION, _NO_TEST])
    of_all = trials[:, :, :-1].sum(axis=2, keepdims=True) / everything[:-1].sum()
    of_cases = trials[:, :, -1:] / everything[-1]
    fit: NDArray[np.float64] = missing + ((of_class / everything[present] - wanted) ** 2).sum(axis=(1, 2))
    fit += 4 * (((of_all - wanted) ** 2).sum(axis=(1, 2)) + ((of_cases - wanted) ** 2).sum(axis=(1, 2)))
    return fit


def _record(dataset: str, rows: "pd.DataFrame", ledger: Ledger, store: Store) -> Json:
    mine = {case: side for case, side in ledger.sides.items() if case in set(rows["patient"])}
    per_row = sides_of(rows, mine)
    report: Json = {}
    for side in SIDES:
        part = rows[per_row == side]
        report[side] = {
            "images": len(part),
            "cases": int(part["patient"].nunique()),
            "images_by_subtype": {s: int((part["subtype"] == s).sum()) for s in SUBTYPES},
            "cases_by_subtype": {s: int(part.loc[part["subtype"] == s, "patient"].nunique()) for s in SUBTYPES},
        }
    present = Counter(rows["subtype"])
    result: Json = {
        "dataset": dataset,
        "ledger": ledger.name,
        "ledger_hash": ledger.hash,
        "method": METHOD,
        "not_estimable": [s for s in SUBTYPES if present[s] and not report["test"]["images_by_subtype"][s]],
        **report,
    }
    payload = {"dataset": dataset, "ledger": ledger.name, "sides": mine}
    return {"split": store.create("split", payload, {**result, "sides": mine}), **result}
