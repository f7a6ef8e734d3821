"""Split ledgers: append-only records of the side (train, validation or test) that each group is on.

A group is a case or a slide. It never changes sides once it is in the ledger, so a champion and a later challenger can
always be compared on the same untouched test cases.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ml.core.errors import Conflict, DataError, StoreError
from ml.core.hashes import digest
from ml.core.messages import cut_text, quote_value
from ml.core.store import Json, Store
from ml.data.identifiers import normalize_name
from ml.data.training_sets import SplitLevel, SplitMethod

FRACTIONS = (0.70, 0.15, 0.15)
"""Target share of the images on each side: train, validation and test."""

HASH_DIGITS = 16
"""Number of hex digits of a pixel hash that a ledger keeps."""

_ATTEMPTS = 5


@dataclass(frozen=True)
class Ledger:
    """The side of each group, the order in which the groups came, and the pictures of each.

    There are three forms of entry:

    - ``{added: {group: side}, images: {group: [16 hex of each pixel hash]}, dataset, seed, hash}``
    - the same without ``images``, in ledgers of early releases;
    - ``{erased: group, why, hash}``: the group keeps its side, and its pictures are forgotten.

    ``hash`` covers everything: each entry is chained to the one before it, so a change of any entry is noticed. Of a
    group's pictures it covers their digest, which replaces them when the group is erased.
    """

    name: str
    method: SplitMethod = "allocator"
    group: SplitLevel = "case"
    entries: tuple[Json, ...] = ()

    @cached_property
    def sides(self) -> dict[str, str]:
        """The side of each group, erased groups included."""
        return {group: side for entry in self.entries for group, side in entry.get("added", {}).items()}

    @cached_property
    def images(self) -> dict[str, frozenset[str]]:
        """The first 16 hex digits of the pixel hashes of each group's pictures; without erased groups."""
        images: dict[str, frozenset[str]] = {}
        for entry in self.entries:
            for group, hashes in entry.get("images", {}).items():
                if not isinstance(hashes, str):
                    images[group] = images.get(group, frozenset()).union(hashes)
        return images

    @cached_property
    def erased(self) -> frozenset[str]:
        """The erased groups, whose pictures may not be used again."""
        return frozenset(entry["erased"] for entry in self.entries if "erased" in entry)

    def is_erased(self, group: str) -> bool:
        """Says whether a group was erased, under this name or under the one that an early release gave it."""
        return normalize_name(group) in self._erased_names

    @cached_property
    def _erased_names(self) -> frozenset[str]:
        return frozenset(map(normalize_name, self.erased))

    @property
    def hash(self) -> str:
        """The SHA-256 of the whole chain; of an empty ledger, that of its name, method, group and fractions."""
        return str(self.entries[-1]["hash"]) if self.entries else digest(self._header())

    def append(
        self, added: Mapping[str, str], images: Mapping[str, Iterable[str]], dataset: str, seed: int
    ) -> "Ledger":
        """Returns a ledger with one more entry.

        Args:
            added: new groups and their sides.
            images: pixel hashes (at least their first 16 hex) of new pictures, by group.
            dataset: the id of the dataset that has them.
            seed: the seed of the search that chose the sides.

        Raises:
            DataError: one of the groups has a side already; a group with new pictures has no side or was erased; or a
                picture would lie on two sides.
        """
        again = sorted(added.keys() & self.sides.keys())
        if again:
            raise DataError(
                f"ledger {self.name!r}: {self.group} {cut_text(again[0])} has its side already and "
                "cannot be given another"
            )
        unknown = sorted(images.keys() - self.sides.keys() - added.keys()) + sorted(filter(self.is_erased, images))
        if unknown:
            raise DataError(f"ledger {self.name!r}: {self.group} {cut_text(unknown[0])} has no side or was erased")
        entry: Json = {
            "added": dict(sorted(added.items())),
            "images": {group: sorted({h[:HASH_DIGITS] for h in images[group]}) for group in sorted(images)},
            "dataset": dataset,
            "seed": seed,
        }
        extended = self._append_entry(entry)
        leaked = _find_leak(extended)
        if leaked:
            raise DataError(f"ledger {self.name!r}: the picture {leaked} would lie on two sides")
        return extended

    def erase(self, group: str, why: str) -> "Ledger":
        """Returns a ledger without the pictures of a group, with an entry that records the erasure.

        The group keeps its side, so that it never changes. Erasing a group again changes nothing.

        Raises:
            DataError: the ledger does not know the group.
        """
        if group not in self.sides:
            raise DataError(f"ledger {self.name!r} knows no {self.group} {quote_value(group)}")
        if group in self.erased:
            return self
        entries = tuple(_erase_images(entry, group) for entry in self.entries)
        return replace(self, entries=entries)._append_entry({"erased": group, "why": why})

    def verify(self) -> "Ledger":
        """Verifies the chain of hashes, and that no group and no picture is on two sides; returns this ledger.

        Raises:
            StoreError: an entry was edited, removed or moved, or something is on two sides.
        """
        file = f"ledgers/{self.name}.json"
        assigned: set[str] = set()
        checked = replace(self, entries=())
        for number, entry in enumerate(self.entries, start=1):
            checked = checked._append_entry({key: value for key, value in entry.items() if key != "hash"})
            if checked.hash != entry.get("hash"):
                raise StoreError(
                    f"{file}: entry {number} does not fit its hash, so it was changed by hand; "
                    "restore the file from a backup: a split cannot be trusted after its ledger was edited"
                )
            again = assigned & entry.get("added", {}).keys()
            if again:
                raise StoreError(f"{file}: {self.group} {cut_text(min(again))} is given a side twice; restore a backup")
            assigned |= entry.get("added", {}).keys()
            missing = {g for g, hashes in entry.get("images", {}).items() if isinstance(hashes, str)} - self.erased
            if missing:
                raise StoreError(
                    f"{file}: the pictures of {self.group} {cut_text(min(missing))} are missing in entry "
                    f"{number}, but it was never erased; restore a backup"
                )
        leaked = _find_leak(self)
        if leaked:
            raise StoreError(f"{file}: the picture {leaked} lies on two sides; restore a backup")
        return self

    def _append_entry(self, entry: Json) -> "Ledger":
        """Returns a ledger with one more entry, whose hash covers all entries up to it."""
        hashed = dict(entry)
        if "images" in entry:
            hashed["images"] = {
                group: hashes if isinstance(hashes, str) else digest(hashes)
                for group, hashes in entry["images"].items()
            }
        return replace(self, entries=(*self.entries, {**entry, "hash": digest([self.hash, hashed])}))

    def _header(self) -> Json:
        return {"name": self.name, "method": self.method, "group": self.group, "fractions": list(FRACTIONS)}

    def to_json(self) -> Json:
        """Returns the content of the ledger's file in the store."""
        return {**self._header(), "entries": list(self.entries), "hash": self.hash}


def _erase_images(entry: Json, group: str) -> Json:
    """Returns an entry in which the digest of a group's pictures stands in their place."""
    images = entry.get("images", {})
    if group not in images:
        return entry
    return {**entry, "images": {**images, group: digest(images[group])}}


def _find_leak(ledger: Ledger) -> str | None:
    """Returns the hash of a picture that lies on two sides, or None."""
    side_of: dict[str, str] = {}
    for group, hashes in ledger.images.items():
        side = ledger.sides.get(group, "")
        for pixel_hash in hashes:
            if side_of.setdefault(pixel_hash, side) != side:
                return pixel_hash
    return None


def read_ledger(
    name: str, store: Store, method: SplitMethod | None = None, group: SplitLevel | None = None
) -> tuple[Ledger, str | None]:
    """Reads and verifies a ledger; an empty one where there is none yet.

    Args:
        name: the ledger's name.
        store: the store that holds it.
        method: the split method that it must have; None: any.
        group: the split level that it must have; None: any.

    Returns:
        the ledger and its version tag for compare-and-set.

    Raises:
        StoreError: the ledger was edited.
        DataError: its method or group is not the required one.
    """
    value, tag = store.read(f"ledgers/{name}.json")
    if value is None:
        return Ledger(name, method or "allocator", group or "case"), None
    try:
        ledger = Ledger(name, value["method"], value["group"], tuple(value["entries"])).verify()
        is_complete = ledger.hash == value["hash"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # the last of a number such as NaN
        raise StoreError(f"ledgers/{name}.json is no ledger ({error!r}); restore the file from a backup") from None
    if not is_complete:
        raise StoreError(f"ledgers/{name}.json: entries were removed from its end; restore the file from a backup")
    if (method or ledger.method, group or ledger.group) != (ledger.method, ledger.group):
        raise DataError(
            f"the training set asks for a split by {group} with the method {method}, but its ledger {name!r} was begun "
            f"by {ledger.group} with the method {ledger.method}, and a ledger keeps both: name another ledger in the "
            f"training set, or ask for {{method: {ledger.method}, group: {ledger.group}}}"
        )
    return ledger, tag


def change_ledger(
    name: str,
    store: Store,
    change: Callable[[Ledger], Ledger],
    method: SplitMethod | None = None,
    group: SplitLevel | None = None,
) -> Ledger:
    """Replaces a ledger in the store by what ``change`` makes of it.

    If another run writes the ledger meanwhile, it is read and changed again.

    Args:
        name: the ledger's name.
        store: the store that holds it.
        change: returns the changed ledger; may be called several times.
        method: see :func:`read_ledger`.
        group: see :func:`read_ledger`.

    Returns:
        the ledger as it is in the store now.

    Raises:
        StoreError: the ledger was edited.
        DataError: its method or group is not the required one.
        Conflict: other runs kept changing the ledger.
    """
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
    """Erases a patient's pictures from every ledger, by case or by slide, under every form of the patient's name.

    Returns:
        the names of the ledgers that know the patient, including those from which the pictures were erased before.

    Raises:
        StoreError: a ledger was edited.
        Conflict: other runs kept changing a ledger.
    """

    def erase(ledger: Ledger) -> Ledger:
        for group in find_groups(ledger):
            ledger = ledger.erase(group, why)
        return ledger

    def find_groups(ledger: Ledger) -> list[str]:
        names = {normalize_name(name) for name in ([patient] if ledger.group == "case" else slides)}
        return sorted(group for group in ledger.sides if normalize_name(group) in names)

    names = [key.removesuffix(".json") for key in store.keys("ledgers") if key.endswith(".json")]
    return [name for name in names if find_groups(change_ledger(name, store, erase))]
