"""Splits by case (or slide) into train, validation and test, kept in an append-only ledger.

A group, which is a case or a slide, never changes sides once it is in the ledger, so a champion and a later challenger
can always be compared on the same untouched test cases. New groups are allotted around the frozen ones. What ties
groups on opposite sides together, such as a picture that is found in both, is quarantined: it is on no side.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import Conflict, DataError, StoreError
from ml.core.store import Json, Store, digest
from ml.core.taxonomy import SIDES, SUBTYPES, label_of
from ml.data.manifest import read_ties
from ml.data.training_sets import Group, Method, read_dataset

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.70, 0.15, 0.15)
"""Wanted share of the images on each side."""

COLUMNS: dict[Group, str] = {"case": "patient", "slide": "slide"}
"""Which column of a dataset tells an image's group."""

QUARANTINED = "quarantined"
"""What :func:`sides_of` says of a row that is on no side."""

QUARANTINE_COLUMNS = ["pixel_sha256", "path", "source", "patient", "slide", "subtype", "reason", "detail"]
"""Columns of a split's quarantine.parquet, a row an image. ``reason`` is one of: ``opposite_sides``, the image's group
is new and tied to groups on opposite sides; ``same_picture``, groups on opposite sides have it both; ``erased``."""

_HASH = 16
"""Hex digits of a pixel hash that a ledger remembers."""

_ATTEMPTS = 5
_TEST_FOLDS, _VALIDATION_FOLDS = 7, 6
"""One of 7 folds is 14% of all, and one of 6 of the rest again."""

_RESTARTS = 16
_PAIRS = 20_000
"""Swaps that are tried at once: all of them up to 200 groups, beyond that a new sample each time."""
_NO_TRAIN, _NO_TEST, _NO_VALIDATION = 1e6, 1e5, 1e1
"""What it costs to leave a class without a case on a side. Without train it cannot be learnt, without test it cannot be
measured; without validation it only takes no part in choosing the threshold."""


@dataclass(frozen=True)
class Ledger:
    """Which side each group is on, in which order the groups came, and which pictures they have.

    There are three forms of entry:

    - ``{added: {group: side}, images: {group: [16 hex of each pixel hash]}, dataset, seed, hash}``
    - the same without ``images``, as ledgers were once written;
    - ``{erased: group, why, hash}``: the group keeps its side, and its pictures are forgotten.

    ``hash`` covers everything: each entry is chained to the one before it, so no entry can be altered unseen. Of a
    group's pictures it covers their digest, which is what stands in their place after the group was erased.
    """

    name: str
    method: Method = "allocator"
    group: Group = "case"
    entries: tuple[Json, ...] = ()

    @cached_property
    def sides(self) -> dict[str, str]:
        """Group -> side, of erased groups too."""
        return {group: side for entry in self.entries for group, side in entry.get("added", {}).items()}

    @cached_property
    def images(self) -> dict[str, frozenset[str]]:
        """Group -> the first 16 hex of the pixel hashes of its pictures; nothing of erased groups."""
        images: dict[str, frozenset[str]] = {}
        for entry in self.entries:
            for group, hashes in entry.get("images", {}).items():
                if not isinstance(hashes, str):
                    images[group] = images.get(group, frozenset()).union(hashes)
        return images

    @cached_property
    def erased(self) -> frozenset[str]:
        """Groups of which nothing may be used again."""
        return frozenset(entry["erased"] for entry in self.entries if "erased" in entry)

    @property
    def hash(self) -> str:
        """SHA-256 over the whole chain; of an empty ledger, over its name, method, group and fractions."""
        return str(self.entries[-1]["hash"]) if self.entries else digest(self._header())

    def append(
        self, added: Mapping[str, str], images: Mapping[str, Iterable[str]], dataset: str, seed: int
    ) -> "Ledger":
        """A ledger with one entry more.

        Args:
            added: new groups and their sides.
            images: pixel hashes (at least their first 16 hex) of new pictures, by group.
            dataset: in which they came.
            seed: of the search that chose the sides.

        Raises:
            DataError: one of the groups has its side already, pictures are of a group without one or of an erased one,
                or a picture would lie on two sides.
        """
        again = sorted(added.keys() & self.sides.keys())
        if again:
            raise DataError(
                f"ledger {self.name!r}: {self.group} {again[0]} has its side already and cannot be given another"
            )
        unknown = sorted(images.keys() - self.sides.keys() - added.keys()) + sorted(images.keys() & self.erased)
        if unknown:
            raise DataError(f"ledger {self.name!r}: {self.group} {unknown[0]} has no side or was erased")
        entry: Json = {
            "added": dict(sorted(added.items())),
            "images": {group: sorted({h[:_HASH] for h in images[group]}) for group in sorted(images)},
            "dataset": dataset,
            "seed": seed,
        }
        made = self._with(entry)
        twice = _on_two_sides(made)
        if twice:
            raise DataError(f"ledger {self.name!r}: the picture {twice} would lie on two sides")
        return made

    def erase(self, group: str, why: str) -> "Ledger":
        """A ledger that forgot the pictures of a group and says so; the group keeps its side, so that it never changes.

        Doing it again changes nothing.

        Raises:
            DataError: the ledger does not know the group.
        """
        if group not in self.sides:
            raise DataError(f"ledger {self.name!r} knows no {self.group} {group!r}")
        if group in self.erased:
            return self
        entries = tuple(_forget(entry, group) for entry in self.entries)
        return replace(self, entries=entries)._with({"erased": group, "why": why})

    def verify(self) -> "Ledger":
        """This ledger, if its chain of hashes holds and no group and no picture is on two sides.

        Raises:
            StoreError: an entry was edited, removed or moved, or something is on two sides.
        """
        where = f"ledgers/{self.name}.json"
        known: set[str] = set()
        checked = replace(self, entries=())
        for number, entry in enumerate(self.entries, start=1):
            checked = checked._with({key: value for key, value in entry.items() if key != "hash"})
            if checked.hash != entry.get("hash"):
                raise StoreError(
                    f"{where}: entry {number} does not fit its hash, so it was changed by hand; "
                    "restore the file from a backup: a split cannot be trusted after its ledger was edited"
                )
            again = known & entry.get("added", {}).keys()
            if again:
                raise StoreError(f"{where}: {self.group} {min(again)} is given a side twice; restore a backup")
            known |= entry.get("added", {}).keys()
            unread = {g for g, pictures in entry.get("images", {}).items() if isinstance(pictures, str)} - self.erased
            if unread:
                raise StoreError(
                    f"{where}: the pictures of {self.group} {min(unread)} are missing in entry {number}, but it was "
                    "never erased; restore a backup"
                )
        twice = _on_two_sides(self)
        if twice:
            raise StoreError(f"{where}: the picture {twice} lies on two sides; restore a backup")
        return self

    def _with(self, entry: Json) -> "Ledger":
        sealed = dict(entry)
        if "images" in entry:
            sealed["images"] = {
                group: hashes if isinstance(hashes, str) else digest(hashes)
                for group, hashes in entry["images"].items()
            }
        return replace(self, entries=(*self.entries, {**entry, "hash": digest([self.hash, sealed])}))

    def _header(self) -> Json:
        return {"name": self.name, "method": self.method, "group": self.group, "fractions": list(FRACTIONS)}

    def to_json(self) -> Json:
        """The file in the store."""
        return {**self._header(), "entries": list(self.entries), "hash": self.hash}


def _forget(entry: Json, group: str) -> Json:
    images = entry.get("images", {})
    if group not in images:
        return entry
    return {**entry, "images": {**images, group: digest(images[group])}}


def _on_two_sides(ledger: Ledger) -> str | None:
    """A picture that lies on two sides, or None."""
    found: dict[str, str] = {}
    for group, hashes in ledger.images.items():
        side = ledger.sides.get(group, "")
        for h in hashes:
            if found.setdefault(h, side) != side:
                return h
    return None


def read_ledger(
    name: str, store: Store, method: Method | None = None, group: Group | None = None
) -> tuple[Ledger, str | None]:
    """A ledger, verified, and its version tag for compare-and-set; an empty one where there is none yet.

    Args:
        name: the ledger's.
        store: where it lies.
        method: what is asked of it; None: whatever it has.
        group: likewise.

    Raises:
        StoreError: the ledger was edited.
        DataError: it was begun with another method or group than those asked for.
    """
    value, tag = store.read(f"ledgers/{name}.json")
    if value is None:
        return Ledger(name, method or "allocator", group or "case"), None
    try:
        ledger = Ledger(name, value["method"], value["group"], tuple(value["entries"])).verify()
        whole = ledger.hash == value["hash"]
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"ledgers/{name}.json is no ledger ({error!r}); restore the file from a backup") from None
    if not whole:
        raise StoreError(f"ledgers/{name}.json: entries were removed from its end; restore the file from a backup")
    if (method or ledger.method, group or ledger.group) != (ledger.method, ledger.group):
        raise DataError(
            f"the training set asks for a split by {group} with the method {method}, but its ledger {name!r} was begun "
            f"by {ledger.group} with the method {ledger.method}, and a ledger keeps both: name another ledger in the "
            f"training set, or ask for {{method: {ledger.method}, group: {ledger.group}}}"
        )
    return ledger, tag


def _change(
    name: str,
    store: Store,
    change: Callable[[Ledger], Ledger],
    method: Method | None = None,
    group: Group | None = None,
) -> Ledger:
    """Change a ledger in the store: read it, and write what ``change`` makes of it unless another run came between."""
    for attempt in range(_ATTEMPTS):
        ledger, tag = read_ledger(name, store, method, group)
        changed = change(ledger)
        if changed.hash == ledger.hash:
            break
        try:
            store.compare_and_set(f"ledgers/{name}.json", changed.to_json(), tag)
        except Conflict:
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            break
    return changed


def erase_from_ledgers(patient: str, slides: Collection[str], store: Store, why: str = "on request") -> list[str]:
    """Make every ledger forget a patient's pictures, whether it is by case or by slide.

    Returns:
        the names of the ledgers that know the patient, those that had forgotten already among them.

    Raises:
        StoreError: a ledger was edited.
        Conflict: other runs kept changing a ledger.
    """

    def erase(ledger: Ledger) -> Ledger:
        for group in _groups_of(ledger):
            ledger = ledger.erase(group, why)
        return ledger

    def _groups_of(ledger: Ledger) -> list[str]:
        return sorted({*([patient] if ledger.group == "case" else slides)} & ledger.sides.keys())

    names = [key.removesuffix(".json") for key in store.keys("ledgers") if key.endswith(".json")]
    return [name for name in names if _groups_of(_change(name, store, erase))]


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
    ledger = _change(
        meta["ledger"],
        store,
        lambda ledger: extend(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))[0],
        asked["method"],
        asked["group"],
    )
    # Told again from the ledger as it is now: it comes out alike, whoever wrote the groups into it.
    _, quarantine = extend(ledger, rows, ties, dataset=dataset, seed=int(meta["seed"]))
    return _record(dataset, rows, ties, ledger, quarantine, store)


class Split(NamedTuple):
    """A split as it was made."""

    group: Group
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


def sides_of(rows: "pd.DataFrame", split: Split) -> NDArray[np.str_]:
    """The side of each row of a dataset, or :data:`QUARANTINED`.

    Raises:
        DataError: a group is missing in the split, or the same pixels lie on two sides.
    """
    out = rows["pixel_sha256"].isin(split.quarantined)
    groups = rows[COLUMNS[split.group]]
    missing = sorted(set(groups[~out]) - split.sides.keys())
    if missing:
        raise DataError(f"the split was made for another dataset: it does not know {split.group} {missing[0]}")
    sides = groups.map(split.sides).mask(out, QUARANTINED)
    leaks = sides.groupby(rows["pixel_sha256"]).nunique()
    if (leaks > 1).any():
        raise DataError(f"the same picture lies on two sides of the split: pixels {leaks.idxmax()}")
    return np.asarray(sides, dtype=np.str_)


def extend(
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
    groups, subtypes = used[COLUMNS[ledger.group]].tolist(), used["subtype"].tolist()
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
        deal = fold if ledger.method == "sgkf" else stratify
        sides = deal(groups, subtypes, seed=seed, together=free.values())
    else:
        counts = {group: [0] * len(SUBTYPES) for group in groups}
        for group, subtype in zip(groups, subtypes, strict=True):
            counts[group][SUBTYPES.index(subtype)] += 1
        sides = allocate(counts, fixed, seed=seed, together=free.values())
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
    column = COLUMNS[ledger.group]
    found: dict[str, set[str]] = {}
    for frame, name in ((rows, column), (ties, column), (ties, f"kept_{column}")):
        for picture, group in zip(frame["pixel_sha256"].tolist(), frame[name].tolist(), strict=True):
            found.setdefault(picture[:_HASH], set()).add(group)
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
    pairs = zip(rows["pixel_sha256"].tolist(), rows[COLUMNS[ledger.group]].tolist(), strict=True)
    for position, (pixels, group) in enumerate(pairs):
        picture = pixels[:_HASH]
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


def fold(groups: list[str], subtypes: list[str], *, seed: int, together: Collection[set[str]] = ()) -> dict[str, str]:
    """Give every group a side by two stages of scikit-learn's StratifiedGroupKFold: the baseline's protocol.

    The first fold of 7 is the test side, the first of 6 of the rest validation; with few groups or images there are
    fewer folds. It keeps shares of classes alike where it can, but promises no class a case in test. It knows no frozen
    sides: what is added to a ledger later is put around them by :func:`allocate`.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: of the shuffling.
        together: groups that must lie on one side.

    Raises:
        DataError: too few groups or images for three sides.
    """
    leaders = _leaders(together)
    units, labels = np.array([leaders.get(group, group) for group in groups]), np.array(subtypes)
    test = _one_fold(units, labels, _TEST_FOLDS, seed, leave=2)
    rest = ~np.isin(units, list(test))
    validation = _one_fold(units[rest], labels[rest], _VALIDATION_FOLDS, seed, leave=1)
    names = dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    return {group: names.get(str(unit), "train") for group, unit in zip(groups, units, strict=True)}


def stratify(
    groups: list[str], subtypes: list[str], *, seed: int, together: Collection[set[str]] = ()
) -> dict[str, str]:
    """Give every group a side by chance within benign and malignant: the baseline's protocol of the binary model.

    It promises no subtype anything. What is added to a ledger later is put around its sides by :func:`allocate`.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: of the shuffling.
        together: groups that must lie on one side.

    Raises:
        DataError: too few groups of benign or malignant for three sides.
    """
    from sklearn.model_selection import train_test_split

    leaders = _leaders(together)
    labels: dict[str, str] = {}
    for group, subtype in zip(groups, subtypes, strict=True):
        unit = leaders.get(group, group)
        labels[unit] = max(labels.get(unit, ""), label_of(subtype))  # malignant wherever there is any
    units = sorted(labels)
    _, validation_share, test_share = FRACTIONS
    try:
        rest, test = train_test_split(
            units, test_size=test_share, random_state=seed, stratify=[labels[unit] for unit in units]
        )
        _, validation = train_test_split(
            rest,
            test_size=validation_share / (1 - test_share),
            random_state=seed,
            stratify=[labels[unit] for unit in rest],
        )
    except ValueError as error:
        raise DataError(
            f"{len(units)} group(s) cannot be dealt to three sides by benign and malignant ({error}); add data, or "
            "take the method allocator and another ledger"
        ) from None
    names = dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    return {group: names.get(leaders.get(group, group), "train") for group in groups}


def hold_out(groups: list[str], subtypes: list[str], *, seed: int) -> set[str]:
    """One group in six for validation, by StratifiedGroupKFold, where train and test are given.

    Raises:
        DataError: too few groups or images.
    """
    return _one_fold(np.array(groups), np.array(subtypes), _VALIDATION_FOLDS, seed, leave=1)


def _one_fold(units: NDArray[np.str_], labels: NDArray[np.str_], folds: int, seed: int, leave: int) -> set[str]:
    """The groups in the first fold that has any and leaves at least so many others."""
    from sklearn.model_selection import StratifiedGroupKFold

    everyone = {str(unit) for unit in units}
    most = max(np.unique(labels, return_counts=True)[1])
    for number in range(min(folds, len(everyone), int(most)), 1, -1):
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            for _, part in splitter.split(labels, labels, units):
                chosen = {str(unit) for unit in units[part]}
                if chosen and len(everyone - chosen) >= leave:
                    return chosen
    raise DataError(
        f"of {len(everyone)} group(s) no class has two images, too few to be folded; add data, or take the method "
        "allocator and another ledger"
    )


def allocate(
    counts: Mapping[str, list[int]],
    frozen: Mapping[str, str],
    *,
    seed: int,
    together: Collection[set[str]] = (),
) -> dict[str, str]:
    """Give every group a side: 70/15/15 of the images, of all and of each class, and no class missing where avoidable.

    Steepest descent from several random starts: the best single move, or else the best swap of two groups, as long as
    one lowers the cost; the best end wins. If that leaves a class out of train or test, one more descent starts where
    a solver found as few classes missing as there can be, so none is missing that another assignment around the frozen
    sides would keep. The same arguments give the same sides.

    Args:
        counts: images of each class, by group.
        frozen: sides that must not change; groups that are not in ``counts`` are ignored.
        seed: of the starts.
        together: new groups that must lie on one side.
    """
    leaders = _leaders(together)
    members: dict[str, list[str]] = {}
    for group in sorted(counts):
        members.setdefault(leaders.get(group, group), []).append(group)
    units = sorted(members)
    images = np.array([np.sum([counts[group] for group in members[unit]], axis=0) for unit in units], dtype=float)
    # A row a unit: its images by class, and a last column that counts its groups.
    weights = np.hstack([images, [[len(members[unit])] for unit in units]])
    fixed = np.array([SIDES.index(frozen[unit]) if unit in frozen else -1 for unit in units])
    free = np.flatnonzero(fixed < 0)
    rng = np.random.default_rng(seed)

    def start() -> NDArray[np.int64]:
        return np.where(fixed < 0, rng.choice(len(SIDES), size=len(units), p=FRACTIONS), fixed)

    # Many groups are near the wanted shares from any start, and each step takes longer.
    ends = [_descend(start(), free, weights, rng) for _ in range(_RESTARTS if len(units) <= 200 else 2)]
    best, cost = min(ends, key=lambda end: end[1])
    if cost >= _NO_TEST and len(free):
        best, _ = min((best, cost), _descend(_cover(images > 0, start(), free), free, weights, rng), key=lambda e: e[1])
    return {group: SIDES[side] for unit, side in zip(units, best, strict=True) for group in members[unit]}


def _leaders(together: Collection[set[str]]) -> dict[str, str]:
    """Group -> the group that stands for all that must lie on one side with it."""
    return {group: min(tied) for tied in together for group in tied}


def _cover(has: NDArray[np.bool_], sides: NDArray[np.int64], free: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sides with as few classes missing from train as there can be; of these, as few from test; then from validation.

    An integer program: groups with the same classes are of one kind, and it says how many of which kind are needed on
    which side (one at most: a second would cover nothing more). The other groups stay where they are.

    Args:
        has: (groups, classes), whether a group has images of a class.
        sides: (groups,) to begin with.
        free: the groups that may be moved.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    has = has[:, has.any(axis=0)]
    fixed = np.setdiff1d(np.arange(len(has)), free)
    there = np.stack([has[fixed[sides[fixed] == side]].any(axis=0) for side in range(len(SIDES))], axis=1)
    kinds, kind_of, available = np.unique(has[free], axis=0, return_inverse=True, return_counts=True)
    n_kinds, n_classes, n = len(kinds), has.shape[1], len(SIDES)
    # Variables: needed[kind, side], then covered[class, side]; the latter are whole where the former are.
    per_kind = np.hstack([np.kron(np.eye(n_kinds), np.ones(n)), np.zeros((n_kinds, n_classes * n))])
    per_class = np.hstack([np.kron(-kinds.T.astype(float), np.eye(n)), np.eye(n_classes * n)])
    # In the order of _NO_TRAIN, _NO_TEST and _NO_VALIDATION, but with numbers that a solver's tolerances cannot blur.
    worth = np.array([(n_classes + 1) ** 2, 1, n_classes + 1])
    found = milp(
        c=np.concatenate([np.zeros(n_kinds * n), np.tile(-worth, n_classes)]),
        integrality=np.concatenate([np.ones(n_kinds * n), np.zeros(n_classes * n)]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(per_kind, ub=available),
            LinearConstraint(per_class, ub=there.ravel().astype(float)),
        ],
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise RuntimeError(f"the covering problem was not solved: {found.message}")
    sides = sides.copy()
    needed = found.x[: n_kinds * n].reshape(n_kinds, n) > 0.5
    for kind in range(n_kinds):
        wanted = np.flatnonzero(needed[kind])
        sides[free[kind_of.ravel() == kind][: len(wanted)]] = wanted
    return sides


def _descend(
    sides: NDArray[np.int64], free: NDArray[np.int64], weights: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    one_hot = np.eye(len(SIDES))
    totals = one_hot[sides].T @ weights  # (sides, classes + 1)
    cost = float(_costs(totals[None], totals)[0])
    every_pair = np.stack(np.triu_indices(len(free), k=1)) if len(free) * (len(free) - 1) // 2 <= _PAIRS else None
    while True:
        a, to = (grid.ravel() for grid in np.meshgrid(free, np.arange(len(SIDES)), indexing="ij"))
        change = (one_hot[to] - one_hot[sides[a]])[:, :, None] * weights[a][:, None, :]
        costs = _costs(totals[None] + change, totals)
        if len(costs) and costs.min() < cost - 1e-12:
            best = int(costs.argmin())
            sides = sides.copy()
            sides[a[best]] = to[best]
        else:
            x, y = free[rng.integers(len(free), size=(2, _PAIRS)) if every_pair is None else every_pair]
            differ = sides[x] != sides[y]
            x, y = x[differ], y[differ]
            change = (one_hot[sides[y]] - one_hot[sides[x]])[:, :, None] * (weights[x] - weights[y])[:, None, :]
            costs = _costs(totals[None] + change, totals)
            # By a sample there is nearly always something to be gained; what cannot be seen in a share is not sought.
            if not len(costs) or costs.min() >= cost - (1e-12 if every_pair is not None else 1e-6):
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


def _record(
    dataset: str,
    rows: "pd.DataFrame",
    ties: "pd.DataFrame",
    ledger: Ledger,
    quarantine: "pd.DataFrame",
    store: Store,
) -> Json:
    usable = set(rows.loc[~rows["pixel_sha256"].isin(quarantine["pixel_sha256"]), COLUMNS[ledger.group]])
    mine = {group: side for group, side in ledger.sides.items() if group in usable}
    split = Split(ledger.group, mine, frozenset(quarantine["pixel_sha256"]))
    per_row = sides_of(rows, split)
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
    groups = rows[COLUMNS[ledger.group]]
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
