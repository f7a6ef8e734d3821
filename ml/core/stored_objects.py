"""What JSON of the store holds, by the place of its file: the fields that are read, with their types.

The store checks each file against this where it reads it, so that one that was edited or overwritten is named. Not
here are files with checks of their own: evidence and bundles (the hash in their id), ledgers, and the audit log.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel

from ml.core.strict_json import Shape

# --- objects ------------------------------------------------------------------------------------------------------

_Counts = dict[str, int]


class _Raw(Shape):
    source: str = ""
    cohort: str | None = None
    kind: str = ""
    files: int = 0
    bytes: int = 0
    skipped: int = 0
    skipped_names: list[str] = Field([])
    rejected: int = 0


class _Manifest(Shape):
    source: str = ""
    cohort: str | None = None
    raw: str = ""
    content: str = ""
    images: int = 0
    duplicates: int = 0
    ties: int = 0
    quarantined: _Counts = Field({})
    layout: str | dict[str, Any] = ""
    inventory: bool = False
    validation: dict[str, Any] = Field({})
    significant_bits: int | None = None


class _Check(Shape):
    name: str
    status: str = ""


class _Validation(Shape):
    passed: bool = False
    manifest: str = ""
    source: str = ""
    suite: str = ""
    checks: list[_Check] = Field([])
    failed: list[_Check] = Field([])
    errored: list[_Check] = Field([])
    warned: list[_Check] = Field([])
    changes: list[str] = Field([])


class _Version(Shape):
    source: str = ""
    manifest: str = ""
    validation: str = ""
    images: int = 0


class _SplitOfDataset(Shape):
    method: str
    group: str


class _Dataset(Shape):
    set: str = ""
    ledger: str = ""
    seed: int = 0
    images: int = 0
    cases: int = 0
    ties: int = 0
    sources: dict[str, str] = Field({})
    split: _SplitOfDataset | None = None


class _Side(Shape):
    images: int = 0
    cases: int = 0


class _Split(Shape):
    dataset: str = ""
    ledger: str = ""
    method: str = ""
    group: Literal["case", "slide"] = "case"
    sides: dict[str, str] = Field({})
    quarantined: _Counts = Field({})
    train: _Side = _Side()
    validation: _Side = _Side()
    test: _Side = _Side()


class _Weights(Shape):
    kind: str = ""
    sha256: str = ""


_OBJECTS: dict[str, type[BaseModel]] = {
    "raw": _Raw,
    "manifest": _Manifest,
    "validation": _Validation,
    "version": _Version,
    "dataset": _Dataset,
    "split": _Split,
    "weights": _Weights,
}
"""Kind -> what its object.json holds."""

# --- memos and caches ---------------------------------------------------------------------------------------------


class _KnownRaw(Shape):
    raw: str


class _KnownManifest(Shape):
    manifest: str
    source: str = ""
    quarantined: _Counts = Field({})


class _KnownValidation(Shape):
    validation: str


class _KnownWeights(Shape):
    id: str
    kind: str


class _KnownObjects(RootModel[dict[str, Annotated[list[str | int], Field(min_length=3, max_length=3)]]]):
    model_config = ConfigDict(strict=True)


_MEMOS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("kaggle", "http", "draw"), _KnownRaw),
    "manifest": _KnownManifest,
    "validate": _KnownValidation,
    "weights": _KnownWeights,
    "s3_objects": _KnownObjects,
}
"""Name -> what such a memo holds. A comparison's simulation checks its own."""


class _CachedPixels(RootModel[list[str]]):
    model_config = ConfigDict(strict=True)


_FACTS = (str, str, str, int, int, str, str, str, float)
"""Types of a row of a picture's facts; earlier releases kept fewer of them."""


def _check_facts(row: list[Any]) -> list[Any]:
    if len(row) < 2 or [type(value) for value in row] != [*_FACTS[: len(row)]]:
        raise ValueError("it is no row of a picture's facts")
    return row


class _CachedFacts(RootModel[list[Annotated[list[Any], AfterValidator(_check_facts)]]]):
    model_config = ConfigDict(strict=True)


_CACHES: dict[str, type[BaseModel]] = {"pixels": _CachedPixels, "pictures": _CachedFacts}
"""Kind of cache -> what the JSON of one of its parts holds."""

# --- mutable values -----------------------------------------------------------------------------------------------


_ObjectId = Annotated[str, Field(pattern="^([a-z]+-[0-9a-z]+)?$")]


class _LatestRaw(Shape):
    raw: _ObjectId = ""
    fetched: str = ""


class _Published(Shape):
    version: _ObjectId = ""
    manifest: _ObjectId = ""
    validation: _ObjectId = ""
    images: int = 0
    published: str = ""


class _ErasedPatient(Shape):
    why: str = ""
    when: str = ""
    datasets: list[str] = Field([])
    slides: list[str] = Field([])


class _ErasedPatients(RootModel[dict[str, _ErasedPatient]]):
    model_config = ConfigDict(strict=True)


_REFERENCES: dict[str, type[BaseModel]] = {"raw": _LatestRaw, "sources": _Published, "erased": _ErasedPatients}
"""Folder below refs/ -> what its files hold."""


class _Lease(Shape):
    owner: str
    beat: float


class _KeptPart(Shape):
    part: str
    epoch: int
    history: dict[str, list[float]]
    arrays: str


class _Checkpoint(_Lease):
    run_id: str | None
    current: _KeptPart | None
    finished: dict[str, _KeptPart]


def find_shape(key: str) -> type[BaseModel] | None:
    """Returns what the file at a key of the store holds, or None if that is not known or is checked elsewhere."""
    folder, _, name = key.rpartition("/")
    shape: type[BaseModel] | None = None
    match [*folder.split("/"), name]:
        case ["objects", "memos", memo, _]:
            shape = _MEMOS.get(memo)
        case ["objects", "caches", cache, _]:
            shape = _CACHES.get(cache.partition("-")[0])
        case ["objects", kind, _, "object.json"]:
            shape = _OBJECTS.get(kind)
        case ["refs", kind, _]:
            shape = _REFERENCES.get(kind)
        case ["jobs", "leases", _]:
            shape = _Lease
        case ["jobs", "training", _, "state.json"]:
            shape = _Checkpoint
    return shape
