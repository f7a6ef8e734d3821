"""Splits by case (or slide) into train, validation and test, kept in an append-only ledger.

A group is a case or a slide. It never changes sides once it is in the ledger, so a champion and a later challenger can
always be compared on the same untouched test cases. New groups are assigned around the frozen ones. What ties groups on
opposite sides together, such as a picture that is found in both, is quarantined: it is on no side.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.columns import read_texts
from ml.core.errors import DataError
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, SUBTYPES
from ml.data.identifiers import find_namesakes, normalize_name
from ml.data.ledger import HASH_DIGITS, Ledger, change_ledger
from ml.data.manifest import read_ties
from ml.data.split_methods import split_by_group_folds, split_by_label, split_by_search
from ml.data.stored_tables import read_stored_table
from ml.data.training_sets import SplitLevel, read_dataset

if TYPE_CHECKING:
    import pandas as pd


GROUP_COLUMNS: dict[SplitLevel, str] = {"case": "patient", "slide": "slide"}
"""The column of a dataset that holds an image's group."""

QUARANTINED = "quarantined"
"""What :func:`look_up_sides` returns for a row that is on no side."""

QUARANTINE_COLUMNS = ["pixel_sha256", "path", "source", "patient", "slide", "subtype", "reason", "detail"]
"""Columns of a split's quarantine.parquet, which has one row per image. ``reason`` is one of: ``opposite_sides``, the
image's group is new and tied to groups on opposite sides, or is itself on opposite sides under two names;
``same_picture``, groups on opposite sides both have it; ``erased``."""


def split_dataset(dataset: str, store: Store) -> Json:
    """Assigns every group of a dataset to a side (the ``split`` stage); groups in the ledger keep theirs.

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
    required = meta.get("split", {"method": "allocator", "group": "case"})
    rows, ties = read_dataset(dataset, store), read_ties(dataset, store)
    ledger = change_ledger(
        meta["ledger"],
        store,
        lambda ledger: extend_ledger(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))[0],
        required["method"],
        required["group"],
    )
    # Computed again from the stored ledger: the quarantine is the same, whichever run wrote the groups into it.
    _, quarantine = extend_ledger(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))
    return _store_split(dataset, rows, ties, ledger, quarantine, store)


class Split(NamedTuple):
    """The sides of a split's groups, and its quarantined images."""

    group: SplitLevel
    sides: dict[str, str]
    """Group -> side."""
    quarantined: frozenset[str] = frozenset()
    """Pixel hashes of the images that are on no side."""


def read_split(split: str, store: Store) -> Split:
    """Reads a split.

    Raises:
        StoreError: no such split.
    """

    meta = store.meta(split)
    quarantined: frozenset[str] = frozenset()
    if meta.get("quarantined"):
        quarantined = frozenset(read_stored_table(split, "quarantine.parquet", store)["pixel_sha256"])
    return Split(meta.get("group", "case"), dict(meta["sides"]), quarantined)


def look_up_sides(rows: "pd.DataFrame", split: Split) -> NDArray[np.str_]:
    """Looks up the side of each row of a dataset.

    Returns:
        (rows,): ``train``, ``validation``, ``test`` or :data:`QUARANTINED`.

    Raises:
        DataError: a group is missing in the split, or the same pixels lie on two sides.
    """
    is_quarantined = rows["pixel_sha256"].isin(split.quarantined)
    read_texts(rows, GROUP_COLUMNS[split.group])
    groups = rows[GROUP_COLUMNS[split.group]]
    missing = sorted(set(groups[~is_quarantined]) - split.sides.keys())
    if missing:
        raise DataError(f"the split was made for another dataset: it does not know {split.group} {missing[0]}")
    sides = groups.map(split.sides).mask(is_quarantined, QUARANTINED)
    leaks = sides.groupby(rows["pixel_sha256"]).nunique()
    if (leaks > 1).any():
        raise DataError(f"the same picture lies on two sides of the split: pixels {leaks.idxmax()}")
    return np.asarray(sides, dtype=np.str_)


def extend_ledger(
    ledger: Ledger, rows: "pd.DataFrame", ties: "pd.DataFrame", *, dataset: str, seed: int
) -> tuple[Ledger, "pd.DataFrame"]:
    """Assigns a dataset's new groups to sides and adds them, with their pictures, to a ledger.

    Groups are tied if the same picture is found in both: among the rows, among the copies that were left out of the
    dataset, or in the ledger. So are two names of one group, such as 1001 and 1001.0: early releases took the latter
    from some tables. Tied groups lie on one side. Where frozen groups lie on opposite sides, all images of the
    new groups tied to them are quarantined, and those new pictures of the frozen groups that both sides have.

    Args:
        ledger: the ledger to extend.
        rows: the rows of the dataset.
        ties: the ties of the dataset, see :func:`ml.data.manifest.read_ties`.
        dataset: the dataset's id.
        seed: the seed of the search for sides.

    Returns:
        the extended ledger, or the same ledger if nothing is new; and the quarantine, with the columns
        :data:`QUARANTINE_COLUMNS`.

    Raises:
        DataError: too few groups for three sides.
    """
    owners = _find_owners(rows, ties, ledger)
    component = _number_components([*owners.values(), *_find_renamed_groups(owners, ledger).values()])
    frozen_in: dict[int, set[str]] = {}
    for group in component.keys() & ledger.sides.keys():
        frozen_in.setdefault(component[group], set()).add(group)
    quarantine, used = _separate_quarantine(rows, ledger, owners, component, frozen_in)
    groups, subtypes = read_texts(used, GROUP_COLUMNS[ledger.group]).tolist(), used["subtype"].tolist()
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
        split_groups = split_by_group_folds if ledger.method == "sgkf" else split_by_label
        sides = split_groups(groups, subtypes, seed=seed, together=free.values())
    else:
        counts = {group: [0] * len(SUBTYPES) for group in groups}
        for group, subtype in zip(groups, subtypes, strict=True):
            counts[group][SUBTYPES.index(subtype)] += 1
        sides = split_by_search(counts, fixed, seed=seed, together=free.values())
    added = {group: sides[group] for group in new}

    pictures = _select_new_pictures(owners, {**ledger.sides, **added}, ledger)
    return (ledger.append(added, pictures, dataset, seed) if added or pictures else ledger), quarantine


def _select_new_pictures(
    owners: Mapping[str, set[str]], sides: Mapping[str, str], ledger: Ledger
) -> dict[str, set[str]]:
    """Returns the pictures of each group that the ledger does not have yet, unless their owners' sides differ."""
    pictures: dict[str, set[str]] = {}
    for picture, groups in owners.items():
        if len({sides[group] for group in groups if group in sides}) == 1:
            for group in groups & sides.keys():
                if not ledger.is_erased(group) and picture not in ledger.images.get(group, ()):
                    pictures.setdefault(group, set()).add(picture)
    return pictures


def _find_owners(rows: "pd.DataFrame", ties: "pd.DataFrame", ledger: Ledger) -> dict[str, set[str]]:
    """Returns the groups that own each picture (first 16 hex digits of its hash), in the dataset or the ledger."""
    column = GROUP_COLUMNS[ledger.group]
    owners: dict[str, set[str]] = {}
    for frame, name in ((rows, column), (ties, column), (ties, f"kept_{column}")):
        for picture, group in zip(frame["pixel_sha256"].tolist(), read_texts(frame, name).tolist(), strict=True):
            owners.setdefault(picture[:HASH_DIGITS], set()).add(group)
    for group, pictures in ledger.images.items():
        for picture in pictures:
            owners.setdefault(picture, set()).add(group)
    return owners


def _find_renamed_groups(owners: Mapping[str, set[str]], ledger: Ledger) -> dict[str, set[str]]:
    """Returns all names of each group that has several, by the present one."""
    names = {group for groups in owners.values() for group in groups}
    return {name: same for name, same in find_namesakes(names | ledger.sides.keys()).items() if len(same) > 1}


def _number_components(tied: Collection[set[str]]) -> dict[str, int]:
    """Numbers the connected components of groups: the groups of one set are tied, directly or by others."""
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


def _separate_quarantine(
    rows: "pd.DataFrame",
    ledger: Ledger,
    owners: Mapping[str, set[str]],
    component: Mapping[str, int],
    frozen_in: Mapping[int, set[str]],
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Separates the rows of a dataset into the quarantine and those that may be used."""

    def name_opposite_groups(groups: Iterable[str]) -> str:
        """Names one group of each side, for the reader to look up; empty if the groups are on one side or none."""
        first: dict[str, str] = {}
        for group in sorted(groups):
            first.setdefault(ledger.sides[group], group)
        return " and ".join(f"{group} ({side})" for side, group in sorted(first.items())) if len(first) > 1 else ""

    opposite = {number: name_opposite_groups(groups) for number, groups in frozen_in.items()}
    renamed = _find_renamed_groups(owners, ledger)
    opposite_names = {name: name_opposite_groups(same & ledger.sides.keys()) for name, same in renamed.items()}
    findings: dict[int, tuple[str, str]] = {}
    pairs = zip(rows["pixel_sha256"].tolist(), rows[GROUP_COLUMNS[ledger.group]].tolist(), strict=True)
    for position, (pixels, group) in enumerate(pairs):
        picture = pixels[:HASH_DIGITS]
        if ledger.is_erased(group):
            findings[position] = ("erased", f"{ledger.group} {group} was erased")
        elif between := opposite_names.get(normalize_name(group)):
            findings[position] = ("opposite_sides", f"{ledger.group} {group} has two names in the ledger: {between}")
        elif group not in ledger.sides:
            if between := opposite.get(component[group]):
                findings[position] = ("opposite_sides", f"{ledger.group} {group} shares pictures with {between}")
        elif picture not in ledger.images.get(group, ()) and (
            between := name_opposite_groups(owners[picture] & ledger.sides.keys())
        ):
            findings[position] = ("same_picture", f"found in {between}")
    reasons, details = zip(*findings.values(), strict=True) if findings else ((), ())
    quarantine = rows.iloc[list(findings)].assign(reason=list(reasons), detail=list(details))[QUARANTINE_COLUMNS]
    is_quarantined = np.zeros(len(rows), dtype=bool)
    is_quarantined[list(findings)] = True
    return quarantine.astype("str"), rows[~is_quarantined]


def _store_split(
    dataset: str,
    rows: "pd.DataFrame",
    ties: "pd.DataFrame",
    ledger: Ledger,
    quarantine: "pd.DataFrame",
    store: Store,
) -> Json:
    """Writes the split to the store; returns the result of the ``split`` stage."""
    usable = set(rows.loc[~rows["pixel_sha256"].isin(quarantine["pixel_sha256"]), GROUP_COLUMNS[ledger.group]])
    sides = {group: side for group, side in ledger.sides.items() if group in usable}
    split = Split(ledger.group, sides, frozenset(quarantine["pixel_sha256"]))
    side_of_row = look_up_sides(rows, split)
    report: Json = {side: _count_side(rows[side_of_row == side]) for side in SIDES}
    absent = [s for s in SUBTYPES if (rows["subtype"] == s).any() and not report["test"]["images_by_subtype"][s]]
    result: Json = {
        "dataset": dataset,
        "ledger": ledger.name,
        "ledger_hash": ledger.hash,
        "method": ledger.method,
        "group": ledger.group,
        "quarantined": {str(k): int(n) for k, n in sorted(quarantine["reason"].value_counts().items())},
        "not_estimable": absent,
        "not_estimable_because": {
            s: _explain_missing_class(s, rows, ties, side_of_row, ledger, dataset) for s in absent
        },
        **report,
    }
    payload = {
        "dataset": dataset,
        "ledger": ledger.name,
        "method": ledger.method,
        "group": ledger.group,
        "sides": sides,
        "quarantine": quarantine[["pixel_sha256", "reason"]].to_numpy().tolist(),
    }
    split_id = store.create(
        "split",
        payload,
        {**result, "sides": sides},
        lambda folder: quarantine.to_parquet(folder / "quarantine.parquet", index=False),
    )
    return {"split": split_id, **result}


def _count_side(part: "pd.DataFrame") -> Json:
    """Counts the images, slides and cases of one side, over all classes and by class."""
    by = {s: part[part["subtype"] == s] for s in SUBTYPES}
    return {
        "images": len(part),
        "slides": int(part["slide"].nunique()),
        "cases": int(part["patient"].nunique()),
        "images_by_subtype": {s: len(rows) for s, rows in by.items()},
        "slides_by_subtype": {s: int(rows["slide"].nunique()) for s, rows in by.items()},
        "cases_by_subtype": {s: int(rows["patient"].nunique()) for s, rows in by.items()},
    }


def _explain_missing_class(
    subtype: str,
    rows: "pd.DataFrame",
    ties: "pd.DataFrame",
    sides: NDArray[np.str_],
    ledger: Ledger,
    dataset: str,
) -> str:
    """Says why a class that the dataset has is not in test; the same each time that the dataset is split."""
    groups = rows[GROUP_COLUMNS[ledger.group]]
    has_class = (rows["subtype"] == subtype).to_numpy()
    all_groups, usable = set(groups[has_class]), set(groups[has_class & (sides != QUARANTINED)])
    level = ledger.group
    if not usable:
        return f"every {level} of {subtype} is quarantined"
    besides = f" besides {len(all_groups - usable)} in quarantine" if all_groups - usable else ""
    if len(usable) == 1:
        return f"{subtype} has 1 {level}{besides}"
    subject = f"{'both' if len(usable) == 2 else f'all {len(usable)}'} {level}s of {subtype}{besides}"
    where = " and ".join(side for side in SIDES if side in set(sides[has_class]))
    before = {group for entry in ledger.entries if entry.get("dataset") != dataset for group in entry.get("added", {})}
    if usable <= before:
        return f"{subject} are frozen in {where}"
    owners = _find_owners(rows, ties, ledger)
    component = _number_components([*owners.values(), *_find_renamed_groups(owners, ledger).values()])
    if len({component[group] for group in usable}) == 1:
        return f"{subject} are tied by pictures that they share, so they are all in {where}"
    if ledger.method != "allocator" and not before:
        return f"the method {ledger.method} put {subject} in {where}"
    return f"{subject} are in {where}: with one in test another class would be missing in train or test"
