"""The fetch stage: every image file of a source becomes a blob in the store, and their list becomes a raw version.

Blobs are named by their content and harmless by themselves; the raw version appears at the end, whole. A fetch that
stops half way leaves nothing behind that a second one would trip over.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import parquet

from ml.core.errors import SourceError
from ml.core.progress import say, track
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest
from ml.data.sources import kaggle
from ml.data.sources.archive import open_archive
from ml.data.sources.directory import Directory
from ml.data.sources.downloads import download, require_space, reserved
from ml.data.sources.files import IMAGE_SUFFIXES, Files, Item, Taken, is_image
from ml.data.sources.spec import DemoSource, DirectorySource, HttpSource, KaggleSource, S3Source, SourceSpec

if TYPE_CHECKING:
    from ml.data.sources.s3 import Bucket

_THREADS = 8  # reading, hashing and writing wait for disks and networks rather than for a core
_NAMES_SHOWN = 20

A = TypeVar("A")
B = TypeVar("B")


class _Row(NamedTuple):
    """One row of files.parquet."""

    path: str
    sha256: str
    bytes: int


def fetch(spec: SourceSpec, store: Store, settings: Settings) -> Json:
    """Bring a source's files into the store (the ``fetch`` stage).

    The raw version's id follows from the source's name and the (path, hash) of each image, so that fetching an
    unchanged source again gives the same id. It is also recorded as the source's latest in refs/raw/<source>.json.

    Returns:
        ``{source, kind, version, files, bytes, skipped}``: the images and their total size, and how many other files
        were left aside (up to 20 of their names are in the raw version's object.json).

    Raises:
        SourceError: nothing to be had there, or a file that cannot be read; names it.
        CredentialsError: a server wants credentials, or refuses the ones it got.
        TryAgain: a network or a server got in the way.
    """
    if isinstance(spec, DirectorySource):
        raw = _keep(spec, Directory(spec.path, _taken(spec)), store, {"path": str(spec.path)})
    elif isinstance(spec, KaggleSource):
        raw = _fetch_kaggle(spec, store, settings)
    elif isinstance(spec, S3Source):
        raw = _fetch_s3(spec, store, settings)
    elif isinstance(spec, HttpSource):
        raw = _fetch_web(spec, store, settings)
    elif isinstance(spec, DemoSource):
        raw = _draw(spec, store, settings)
    else:
        raise TypeError(f"no way to fetch a {type(spec).__name__}")
    meta = store.meta(raw)
    if meta["skipped"]:
        say(f"{spec.name}: {meta['skipped']} other files left aside, such as {', '.join(meta['skipped_names'][:3])}")
    _point_to(raw, spec, store)
    return {"version": raw} | {key: meta[key] for key in ("source", "kind", "files", "bytes", "skipped")}


def _fetch_kaggle(spec: KaggleSource, store: Store, settings: Settings) -> str:
    with kaggle.ask(spec) as remote:

        def make() -> str:
            with remote.reserved(settings.cache / "kaggle") as folder:
                path = remote.download(folder, store)
                return _unpack(path, spec, {"dataset": spec.dataset, **(remote.identity or {})}, store)

        if not remote.identity:
            return make()
        return _unless_known(spec, remote.identity, store, make, f"{spec.dataset} has not changed on Kaggle")


def _fetch_s3(spec: S3Source, store: Store, settings: Settings) -> str:
    from ml.data.sources.s3 import Bucket

    bucket = Bucket(spec, _taken(spec))
    identity = bucket.look() if spec.archive else bucket.list()
    origin = {name: value for name, value in identity.items() if name != "objects"}
    place = {"bucket": spec.bucket, "endpoint": spec.endpoint}

    def make() -> str:
        if not spec.archive:
            with _remembered(bucket, place | {"prefix": spec.prefix}, store) as rows:
                return _keep(spec, bucket, store, origin, rows)
        folder = settings.cache / "s3" / digest(place | {"archive": spec.archive})
        with reserved(folder, f"s3://{spec.bucket}/{spec.archive}"):
            path = folder / digest(identity)
            for other in folder.iterdir():  # of a state that this archive is no longer in
                if other.name not in ("lock", path.name, f"{path.name}.part"):
                    other.unlink()
            if not path.exists():
                bucket.download(path, identity)
            return _unpack(path, spec, origin, store)

    return _unless_known(spec, identity, store, make)


@contextmanager
def _remembered(bucket: "Bucket", place: Json, store: Store) -> Iterator[dict[str, _Row]]:
    """The objects of a bucket that were fetched before and have kept their ETag and size, by name.

    What is added to them within the block is remembered for the next fetch, also when this one breaks off.
    """
    before = store.memo("s3_objects", place) or {}
    rows = {
        name: _Row(name, before[one.key][2], one.size)
        for name, one in bucket.objects.items()
        if before.get(one.key, [])[:2] == [one.etag, one.size]
    }
    try:
        yield rows
    finally:
        known = {
            one.key: [one.etag, one.size, rows[name].sha256] for name, one in bucket.objects.items() if name in rows
        }
        store.set_memo("s3_objects", place, known)


def _fetch_web(spec: HttpSource, store: Store, settings: Settings) -> str:
    def make() -> str:
        folder = settings.cache / "http" / spec.sha256
        with reserved(folder, spec.url):
            path = folder / "archive"
            if not path.exists():
                download(spec, path)
            return _unpack(path, spec, {"url": spec.url}, store)

    return _unless_known(spec, {"sha256": spec.sha256}, store, make)


def _unless_known(
    spec: SourceSpec,
    identity: Json,
    store: Store,
    make: Callable[[], str],
    unchanged: str = "nothing has changed there",
) -> str:
    """What was made of the same thing before, or else what ``make`` makes of it now."""
    inputs = {"source": spec.name, "identity": identity, "taken": _what_is_taken(spec)}
    known = store.memo(spec.kind, inputs)
    if known and store.exists(known["raw"]):
        say(f"{spec.name}: {unchanged}; nothing to download")
        return str(known["raw"])
    raw = make()
    store.set_memo(spec.kind, inputs, {"raw": raw})
    return raw


def _taken(spec: SourceSpec) -> Taken:
    """What of a source is brought into the store: its images, and its table if it has one."""
    return lambda name: is_image(name) or (spec.table is not None and name == spec.table.file)


def _what_is_taken(spec: SourceSpec) -> list[str]:
    return [*IMAGE_SUFFIXES, *([spec.table.file] if spec.table else [])]


def _unpack(path: Path, spec: SourceSpec, origin: Json, store: Store) -> str:
    """Read the images out of a downloaded archive, which is removed: they are in the store now, or it is no good."""
    try:
        with open_archive(path, _taken(spec)) as archive:
            require_space([(store.path(""), archive.unpacked_bytes)])
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            raw = _keep(spec, archive, store, {**origin, "archive_sha256": sha256})
    except SourceError as error:
        path.unlink(missing_ok=True)
        raise SourceError(f"{error}; the download was removed, so fetching again downloads it anew") from None
    path.unlink()
    return raw


def _draw(spec: DemoSource, store: Store, settings: Settings) -> str:
    from ml.data.sources.demo import DRAWING_VERSION, draw_files

    inputs = {"source": spec.name, "images": spec.images, "seed": spec.seed, "drawing": DRAWING_VERSION}
    known = store.memo("draw", inputs)
    if known and store.exists(known["raw"]):
        return str(known["raw"])
    drawn = draw_files(spec.images, spec.seed, settings.worker_count)
    items = ((path, partial(bytes, data)) for path, data in drawn)
    raw = _keep_rows(spec, _blobs(items, store, None, total=spec.images, what="drawing"), [], store, inputs)
    store.set_memo("draw", inputs, {"raw": raw})
    return raw


def _keep(spec: SourceSpec, files: Files, store: Store, origin: Json, known: dict[str, _Row] | None = None) -> str:
    if not files.images:
        where = next(value for name in ("path", "dataset", "url", "archive", "bucket") if (value := origin.get(name)))
        other = f" ({len(files.skipped)} other files, such as {files.skipped[0]})" if files.skipped else ""
        raise SourceError(f"{spec.file}: no image files below {where}{other}; looked for {' '.join(IMAGE_SUFFIXES)}")
    rows = _blobs(files.items(), store, known, total=len(files.images), what=f"fetching {spec.name}")
    return _keep_rows(spec, rows, files.skipped, store, origin)


def _keep_rows(spec: SourceSpec, rows: list[_Row], skipped: list[str], store: Store, origin: Json) -> str:
    """Make the raw version; ``origin`` says where it came from, for people."""
    meta = {
        "source": spec.name,
        "kind": spec.kind,
        "cohort": spec.cohort,
        "files": len(rows),
        "bytes": sum(row.bytes for row in rows),
        "skipped": len(skipped),
        "skipped_names": skipped[:_NAMES_SHOWN],
        "origin": origin,
    }
    payload = [spec.name, [[row.path, row.sha256] for row in rows]]
    return store.create("raw", payload, meta, lambda folder: _write(rows, folder / "files.parquet"))


def _write(rows: list[_Row], path: Path) -> None:
    schema = pa.schema([("path", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])
    parquet.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=schema), path)


def _point_to(raw: str, spec: SourceSpec, store: Store) -> None:
    """Record the source's latest raw version, for whoever makes a manifest by hand."""
    ref = f"refs/raw/{spec.name}.json"
    current, tag = store.read(ref)
    if not current or current["raw"] != raw:
        store.compare_and_set(ref, {"raw": raw, "fetched": datetime.now(UTC).isoformat(timespec="seconds")}, tag)


def _blobs(items: Iterable[Item], store: Store, known: dict[str, _Row] | None, *, total: int, what: str) -> list[_Row]:
    """Put every file into the store, several at a time; the rows sorted by path.

    Those in ``known`` are not read again; the others are added to it, one by one.
    """
    known = {} if known is None else known

    def put(item: Item) -> _Row:
        path, read = item
        if path not in known or not store.path(store.blob_key(known[path].sha256)).exists():
            data = read()
            known[path] = _Row(path, store.put_blob(data), len(data))
        return known[path]

    return sorted(track(_in_threads(put, items), total=total, what=what))


def _in_threads(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` over threads that takes items only as fast as results go out, so that few are in memory at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
