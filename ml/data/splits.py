"""Splits by case (or slide) into train, validation and test, kept in an append-only ledger.

A group, which is a case or a slide, never changes sides once it is in the ledger, so a champion and a later challenger
can always be compared on the same untouched test cases. New groups are allotted around the frozen ones. What ties
groups on opposite sides together, such as a picture that is found in both, is quarantined: it is on no side.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, SUBTYPES
from ml.data.ledger import HASH_DIGITS, Ledger, change_ledger
from ml.data.manifest import read_ties
from ml.data.split_methods import split_by_group_folds, split_by_label, split_by_search
from ml.data.training_sets import SplitLevel, read_dataset

if TYPE_CHECKING:
    import pandas as pd


GROUP_COLUMNS: dict[SplitLevel, str] = {"case": "patient", "slide": "slide"}
"""Which column of a dataset tells an image's group."""

QUARANTINED = "quarantined"
"""What :func:`look_up_sides` says of a row that is on no side."""

QUARANTINE_COLUMNS = ["pixel_sha256", "path", "source", "patient", "slide", "subtype", "reason", "detail"]
"""Columns of a split's quarantine.parquet, a row an image. ``reason`` is one of: ``opposite_sides``, the image's group
is new and tied to groups on opposite sides; ``same_picture``, groups on opposite sides have it both; ``erased``."""


def split_dataset(dataset: str, store: Store) -> Json:
    """Put every group of a dataset on a side (the ``split`` stage); groups in the ledger keep theirs.

    Returns:
        ``{split, dataset, ledger, ledger_hash, method, group, quarantined, not_estimable, not_estimable_because, train,
        validation, test}``; each side has ``images``, ``slides``, ``cases`` and all three by subtype; ``quarantined``
        counts images by reason; ``not_estimable`` names the classes that have no image in test, and
        ``not_estimable_because`` says why.

    Raises:
        DataError: too few groups for three sides, or the ledger has another method or group than the training set asks
            for.
        StoreError: the ledger was edited.
        Conflict: other runs kept changing the ledger.
    """
    meta = store.meta(dataset)
    asked = meta.get("split", {"method": "allocator", "group": "case"})
    rows, ties = read_dataset(dataset, store), read_ties(dataset, store)
    ledger = change_ledger(
        meta["ledger"],
        store,
        lambda ledger: extend_ledger(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))[0],
        asked["method"],
        asked["group"],
    )
    # Told again from the ledger as it is now: it comes out alike, whoever wrote the groups into it.
    _, quarantine = extend_ledger(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))
    return _record(dataset, rows, ties, ledger, quarantine, store)


class Split(NamedTuple):
    """A split as it was made."""

    group: SplitLevel
    sides: dict[str, str]
    """Group -> side."""
    quarantined: frozenset[str] = frozenset()
    """Pixel hashes of the images that are on no side."""


def read_split(split: str, store: Store) -> Split:
    """A split, as it was made.

    Raises:
        StoreError: no such split.
    """
    import pandas as pd

    meta = store.meta(split)
    quarantined: frozenset[str] = frozenset()
    if meta.get("quarantined"):
        quarantined = frozenset(pd.read_parquet(store.file(split, "quarantine.parquet"))["pixel_sha256"])
    return Split(meta.get("group", "case"), dict(meta["sides"]), quarantined)


def look_up_sides(rows: "pd.DataFrame", split: Split) -> NDArray[np.str_]:
    """The side of each row of a dataset, or :data:`QUARANTINED`.

    Raises:
        DataError: a group is missing in the split, or the same pixels lie on two sides.
    """
    out = rows["pixel_sha256"].isin(split.quarantined)
    groups = rows[GROUP_COLUMNS[split.group]]
    missing = sorted(set(groups[~out]) - split.sides.keys())
    if missing:
        raise DataError(f"the split was made for another dataset: it does not know {split.group} {missing[0]}")
    sides = groups.map(split.sides).mask(out, QUARANTINED)
    leaks = sides.groupby(rows["pixel_sha256"]).nunique()
    if (leaks > 1).any():
        raise DataError(f"the same picture lies on two sides of the split: pixels {leaks.idxmax()}")
    return np.asarray(sides, dtype=np.str_)


def extend_ledger(
    ledger: Ledger, rows: "pd.DataFrame", ties: "pd.DataFrame", *, dataset: str, seed: int
) -> tuple[Ledger, "pd.DataFrame"]:
    """A ledger with a dataset's new groups and pictures, the same ledger if there are none; and what is quarantined.

    Groups are tied if the same picture is found in both: among the rows, among the copies that ``assemble`` left out,
    or in the ledger's memory. Tied groups lie on one side. Where frozen ones lie on opposite sides, the new groups tied
    to them are quarantined whole, and of the frozen groups those new pictures that both sides have.

    Returns:
        the ledger, and the quarantine with :data:`QUARANTINE_COLUMNS`.

    Raises:
        DataError: too few groups for three sides.
    """
    found = _groups_by_picture(rows, ties, ledger)
    component = _components(found.values())
    frozen_in: dict[int, set[str]] = {}
    for group in component.keys() & ledger.sides.keys():
        frozen_in.setdefault(component[group], set()).add(group)
    quarantine, used = _quarantine(rows, ledger, found, component, frozen_in)
    groups, subtypes = used[GROUP_COLUMNS[ledger.group]].tolist(), used["subtype"].tolist()
    if len(set(groups)) < len(SIDES):
        left_out = f" ({len(quarantine)} images are quarantined)" if len(quarantine) else ""
        raise DataError(
            f"{dataset}: {len(set(groups))} {ledger.group}(s){left_out}; a split needs at least {len(SIDES)}"
        )
    fixed = dict(ledger.sides)
    free: dict[int, set[str]] = {}
    new = set(groups) - ledger.sides.keys()
    for group in new:
        if frozen := frozen_in.get(component[group]):
            fixed[group] = ledger.sides[min(frozen)]  # they are all on one side, or this one would be quarantined
        else:
            free.setdefault(component[group], set()).add(group)
    if not free:
        sides = fixed
    elif ledger.method != "allocator" and not ledger.sides:
        deal = split_by_group_folds if ledger.method == "sgkf" else split_by_label
        sides = deal(groups, subtypes, seed=seed, together=free.values())
    else:
        counts = {group: [0] * len(SUBTYPES) for group in groups}
        for group, subtype in zip(groups, subtypes, strict=True):
            counts[group][SUBTYPES.index(subtype)] += 1
        sides = split_by_search(counts, fixed, seed=seed, together=free.values())
    added = {group: sides[group] for group in new}

    pictures = _to_remember(found, {**ledger.sides, **added}, ledger)
    return (ledger.append(added, pictures, dataset, seed) if added or pictures else ledger), quarantine


def _to_remember(found: Mapping[str, set[str]], sides: Mapping[str, str], ledger: Ledger) -> dict[str, set[str]]:
    """Group -> pictures that the ledger does not know of it; of every group that has them, unless sides differ."""
    pictures: dict[str, set[str]] = {}
    for picture, owners in found.items():
        if len({sides[group] for group in owners if group in sides}) == 1:
            for group in owners & sides.keys() - ledger.erased:
                if picture not in ledger.images.get(group, ()):
                    pictures.setdefault(group, set()).add(picture)
    return pictures


def _groups_by_picture(rows: "pd.DataFrame", ties: "pd.DataFrame", ledger: Ledger) -> dict[str, set[str]]:
    """The first 16 hex of each picture's hash -> the groups in which it is found, now or before."""
    column = GROUP_COLUMNS[ledger.group]
    found: dict[str, set[str]] = {}
    for frame, name in ((rows, column), (ties, column), (ties, f"kept_{column}")):
        for picture, group in zip(frame["pixel_sha256"].tolist(), frame[name].tolist(), strict=True):
            found.setdefault(picture[:HASH_DIGITS], set()).add(group)
    for group, pictures in ledger.images.items():
        for picture in pictures:
            found.setdefault(picture, set()).add(group)
    return found


def _components(tied: Collection[set[str]]) -> dict[str, int]:
    """Group -> number of the component it is in; the groups of one set are tied, and so are those tied to them."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    numbers = {
        group: number for number, group in enumerate(dict.fromkeys(group for groups in tied for group in groups))
    }
    edges = [(numbers[first], numbers[group]) for first, *others in tied for group in others]
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(edges), dtype=bool), tuple(ends)), shape=(len(numbers), len(numbers)))
    _, component = connected_components(graph, directed=False)
    return {group: int(component[number]) for group, number in numbers.items()}


def _quarantine(
    rows: "pd.DataFrame",
    ledger: Ledger,
    found: Mapping[str, set[str]],
    component: Mapping[str, int],
    frozen_in: Mapping[int, set[str]],
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """The quarantine, and the rows that may be used."""

    def torn(groups: Iterable[str]) -> str:
        """One group of each side, so that the reader can look it up; nothing if there is one side or none."""
        first: dict[str, str] = {}
        for group in sorted(groups):
            first.setdefault(ledger.sides[group], group)
        return " and ".join(f"{group} ({side})" for side, group in sorted(first.items())) if len(first) > 1 else ""

    opposite = {number: torn(groups) for number, groups in frozen_in.items()}
    why: dict[int, tuple[str, str]] = {}
    pairs = zip(rows["pixel_sha256"].tolist(), rows[GROUP_COLUMNS[ledger.group]].tolist(), strict=True)
    for position, (pixels, group) in enumerate(pairs):
        picture = pixels[:HASH_DIGITS]
        if group in ledger.erased:
            why[position] = ("erased", f"{ledger.group} {group} was erased")
        elif group not in ledger.sides:
            if between := opposite.get(component[group]):
                why[position] = ("opposite_sides", f"{ledger.group} {group} shares pictures with {between}")
        elif picture not in ledger.images.get(group, ()) and (between := torn(found[picture] & ledger.sides.keys())):
            why[position] = ("same_picture", f"found in {between}")
    reasons, details = zip(*why.values(), strict=True) if why else ((), ())
    quarantine = rows.iloc[list(why)].assign(reason=list(reasons), detail=list(details))[QUARANTINE_COLUMNS]
    out = np.zeros(len(rows), dtype=bool)
    out[list(why)] = True
    return quarantine.astype("str"), rows[~out]


def _record(
    dataset: str,
    rows: "pd.DataFrame",
    ties: "pd.DataFrame",
    ledger: Ledger,
    quarantine: "pd.DataFrame",
    store: Store,
) -> Json:
    usable = set(rows.loc[~rows["pixel_sha256"].isin(quarantine["pixel_sha256"]), GROUP_COLUMNS[ledger.group]])
    mine = {group: side for group, side in ledger.sides.items() if group in usable}
    split = Split(ledger.group, mine, frozenset(quarantine["pixel_sha256"]))
    per_row = look_up_sides(rows, split)
    report: Json = {side: _tell(rows[per_row == side]) for side in SIDES}
    absent = [s for s in SUBTYPES if (rows["subtype"] == s).any() and not report["test"]["images_by_subtype"][s]]
    result: Json = {
        "dataset": dataset,
        "ledger": ledger.name,
        "ledger_hash": ledger.hash,
        "method": ledger.method,
        "group": ledger.group,
        "quarantined": {str(k): int(n) for k, n in sorted(quarantine["reason"].value_counts().items())},
        "not_estimable": absent,
        "not_estimable_because": {s: _why(s, rows, ties, per_row, ledger, dataset) for s in absent},
        **report,
    }
    payload = {
        "dataset": dataset,
        "ledger": ledger.name,
        "method": ledger.method,
        "group": ledger.group,
        "sides": mine,
        "quarantine": quarantine[["pixel_sha256", "reason"]].to_numpy().tolist(),
    }
    made = store.create(
        "split",
        payload,
        {**result, "sides": mine},
        lambda folder: quarantine.to_parquet(folder / "quarantine.parquet", index=False),
    )
    return {"split": made, **result}


def _tell(part: "pd.DataFrame") -> Json:
    """Images, slides and cases of one side, of all classes and of each."""
    by = {s: part[part["subtype"] == s] for s in SUBTYPES}
    return {
        "images": len(part),
        "slides": int(part["slide"].nunique()),
        "cases": int(part["patient"].nunique()),
        "images_by_subtype": {s: len(rows) for s, rows in by.items()},
        "slides_by_subtype": {s: int(rows["slide"].nunique()) for s, rows in by.items()},
        "cases_by_subtype": {s: int(rows["patient"].nunique()) for s, rows in by.items()},
    }


def _why(
    subtype: str,
    rows: "pd.DataFrame",
    ties: "pd.DataFrame",
    on: NDArray[np.str_],
    ledger: Ledger,
    dataset: str,
) -> str:
    """Why a class that the dataset has is not in test. The same each time that the dataset is split."""
    groups = rows[GROUP_COLUMNS[ledger.group]]
    mine = (rows["subtype"] == subtype).to_numpy()
    every, used = set(groups[mine]), set(groups[mine & (on != QUARANTINED)])
    word = ledger.group
    if not used:
        return f"every {word} of {subtype} is quarantined"
    besides = f" besides {len(every - used)} in quarantine" if every - used else ""
    if len(used) == 1:
        return f"{subtype} has 1 {word}{besides}"
    them = f"{'both' if len(used) == 2 else f'all {len(used)}'} {word}s of {subtype}{besides}"
    where = " and ".join(side for side in SIDES if side in set(on[mine]))
    before = {group for entry in ledger.entries if entry.get("dataset") != dataset for group in entry.get("added", {})}
    if used <= before:
        return f"{them} are frozen in {where}"
    component = _components(_groups_by_picture(rows, ties, ledger).values())
    if len({component[group] for group in used}) == 1:
        return f"{them} are tied by pictures that they share, so they are all in {where}"
    if ledger.method != "allocator" and not before:
        return f"the method {ledger.method} put {them} in {where}"
    return f"{them} are in {where}: with one in test another class would be missing in train or test"
