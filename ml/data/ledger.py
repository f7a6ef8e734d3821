"""Split ledgers: which side each group is on, for ever.

A group, which is a case or a slide, never changes sides once it is in the ledger, so a champion and a later challenger
can always be compared on the same untouched test cases.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ml.core.errors import Conflict, DataError, StoreError
from ml.core.store import Json, Store, digest
from ml.data.training_sets import SplitLevel, SplitMethod

FRACTIONS = (0.70, 0.15, 0.15)
"""Wanted share of the images on each side."""

HASH_DIGITS = 16
"""Hex digits of a pixel hash that a ledger remembers."""

_ATTEMPTS = 5


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
    method: SplitMethod = "allocator"
    group: SplitLevel = "case"
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
            "images": {group: sorted({h[:HASH_DIGITS] for h in images[group]}) for group in sorted(images)},
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
    name: str, store: Store, method: SplitMethod | None = None, group: SplitLevel | None = None
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


def change_ledger(
    name: str,
    store: Store,
    change: Callable[[Ledger], Ledger],
    method: SplitMethod | None = None,
    group: SplitLevel | None = None,
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
    return [name for name in names if _groups_of(change_ledger(name, store, erase))]
