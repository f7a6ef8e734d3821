"""The fetch stage: every image file of a source becomes a blob in the store, and their list becomes a raw version.

Blobs are named by their content and do no harm by themselves; the complete raw version appears at the end. So a fetch
that is interrupted leaves nothing that disturbs the next one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import parquet

from ml.core.errors import SourceError
from ml.core.hashes import digest, hash_file
from ml.core.messages import cut_text, list_items
from ml.core.progress import say, track
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.sources import kaggle
from ml.data.sources.archive import open_archive
from ml.data.sources.directory import Directory
from ml.data.sources.downloads import download_archive, require_space, reserve_folder
from ml.data.sources.files import (
    IMAGE_SUFFIXES,
    FileReader,
    FileRejected,
    Files,
    PathFilter,
    RejectedFile,
    is_image,
    shorten_path,
)
from ml.data.sources.spec import DemoSource, DirectorySource, HttpSource, KaggleSource, S3Source, SourceSpec
from ml.data.sources.speed_limit import limit_speed
from ml.data.stored_tables import read_stored_table

if TYPE_CHECKING:
    from ml.data.sources.s3 import Bucket

_THREADS = 8  # reading, hashing and writing wait for disks and networks rather than for a CPU core
_NAMES_SHOWN = 20

Input = TypeVar("Input")
Output = TypeVar("Output")


class _Row(NamedTuple):
    """A row of files.parquet."""

    path: str
    sha256: str
    bytes: int


def fetch(spec: SourceSpec, store: Store, settings: Settings) -> Json:
    """Fetches a source's files into the store (the ``fetch`` stage).

    The raw version's id follows from the source's name and the (path, hash) of each image, so that fetching an
    unchanged source again gives the same id. It is also recorded as the source's latest in refs/raw/<source>.json.

    Returns:
        ``{source, kind, version, files, bytes, skipped, rejected}``: the images and their total size, how many other
        files were skipped (up to 20 of their names are in the raw version's object.json), and how many images could
        not be taken: they are in the raw version's rejected.parquet, if there are any, and become rows of the
        quarantine.

    Raises:
        SourceError: the source or its table cannot be read, or it has no images.
        CredentialsError: a server requires credentials, or refuses those it was given.
        TryAgain: a network or a server failed for the moment, or is too slow.
    """
    limit_speed()
    if isinstance(spec, DirectorySource):
        raw = _store_files(spec, Directory(spec.path, settings, _path_filter(spec)), store, {"path": str(spec.path)})
    elif isinstance(spec, KaggleSource):
        raw = _fetch_kaggle(spec, store, settings)
    elif isinstance(spec, S3Source):
        raw = _fetch_s3(spec, store, settings)
    elif isinstance(spec, HttpSource):
        raw = _fetch_http(spec, store, settings)
    elif isinstance(spec, DemoSource):
        raw = _draw_demo(spec, store, settings)
    else:
        raise TypeError(f"no way to fetch a {type(spec).__name__}")
    meta = store.meta(raw)
    if meta["skipped"]:
        examples = list_items(meta["skipped_names"][:3])
        say(f"{spec.name}: {meta['skipped']} other files left aside, such as {examples}")
    rejected = meta.get("rejected", 0)
    if rejected:
        say(f"{spec.name}: {rejected} image files cannot be taken; the manifest's quarantine says why")
    _set_latest(raw, spec, store)
    kept = {key: meta[key] for key in ("source", "kind", "files", "bytes", "skipped")}
    return {"version": raw, **kept, "rejected": rejected}


def _fetch_kaggle(spec: KaggleSource, store: Store, settings: Settings) -> str:
    """Downloads a Kaggle data set's archive, if it changed; returns the raw version's id."""
    with kaggle.request_archive(spec) as remote:

        def make() -> str:
            with remote.reserve_folder(settings.cache / "kaggle") as folder:
                path = remote.download(folder, store)
                return _store_archive(path, spec, {"dataset": spec.dataset, **(remote.identity or {})}, store, settings)

        if not remote.identity:
            return make()
        return _reuse_or_make(spec, remote.identity, store, make, f"{spec.dataset} has not changed on Kaggle")


def _fetch_s3(spec: S3Source, store: Store, settings: Settings) -> str:
    """Reads the objects or the archive of an S3 source, if they changed; returns the raw version's id."""
    from ml.data.sources.s3 import Bucket

    bucket = Bucket(spec, settings, _path_filter(spec))
    identity = bucket.identify_archive() if spec.archive else bucket.list_objects()
    origin = {name: value for name, value in identity.items() if name != "objects"}
    place = {"bucket": spec.bucket, "endpoint": spec.endpoint}

    def make() -> str:
        if not spec.archive:
            with _known_objects(bucket, place | {"prefix": spec.prefix}, store) as rows:
                new = sum(entry.size for name, entry in bucket.objects.items() if name not in rows)
                require_space([(store.path(""), new)])
                return _store_files(spec, bucket, store, origin, rows)
        folder = settings.cache / "s3" / digest(place | {"archive": spec.archive})
        with reserve_folder(folder, f"s3://{spec.bucket}/{spec.archive}"):
            path = folder / digest(identity)
            for other in folder.iterdir():  # an earlier state of this archive
                if other.name not in ("lock", path.name, f"{path.name}.part"):
                    other.unlink()
            if not path.exists():
                bucket.download_archive(path, identity)
            return _store_archive(path, spec, origin, store, settings)

    return _reuse_or_make(spec, identity, store, make)


@contextmanager
def _known_objects(bucket: "Bucket", place: Json, store: Store) -> Iterator[dict[str, _Row]]:
    """Yields the rows, by name, of a bucket's objects that were fetched before and have the same ETag and size.

    Rows that the block adds are stored for the next fetch, even if this one breaks off.
    """
    stored = store.memo("s3_objects", place) or {}
    rows = {
        name: _Row(name, stored[entry.key][2], entry.size)
        for name, entry in bucket.objects.items()
        if stored.get(entry.key, [])[:2] == [entry.etag, entry.size]
    }
    try:
        yield rows
    finally:
        known = {
            entry.key: [entry.etag, entry.size, rows[name].sha256]
            for name, entry in bucket.objects.items()
            if name in rows
        }
        store.set_memo("s3_objects", place, known)


def _fetch_http(spec: HttpSource, store: Store, settings: Settings) -> str:
    """Downloads the archive at a web address, unless it was fetched before; returns the raw version's id."""

    def make() -> str:
        folder = settings.cache / "http" / spec.sha256
        with reserve_folder(folder, spec.shown_url):
            path = folder / "archive"
            if not path.exists():
                download_archive(spec, path)
            return _store_archive(path, spec, {"url": spec.shown_url}, store, settings)

    return _reuse_or_make(spec, {"sha256": spec.sha256}, store, make)


def _reuse_or_make(
    spec: SourceSpec,
    identity: Json,
    store: Store,
    make: Callable[[], str],
    unchanged: str = "nothing has changed there",
) -> str:
    """Returns the raw version that was made of the same state of the source before, or else what ``make`` returns."""
    inputs = {"source": spec.name, "identity": identity, "taken": _list_wanted(spec)}
    known = store.memo(spec.kind, inputs)
    if known and store.exists(known["raw"]) and _has_present_names(known["raw"], spec, store):
        say(f"{spec.name}: {unchanged}; nothing to download")
        return str(known["raw"])
    raw = make()
    store.set_memo(spec.kind, inputs, {"raw": raw})
    return raw


def _has_present_names(raw: str, spec: SourceSpec, store: Store) -> bool:
    """Says whether a raw version has the names that fetching gives files now.

    Early releases took AppleDouble files for images, and ``./a.png`` for another file than ``a.png``.
    """
    is_wanted = _path_filter(spec)
    paths = read_stored_table(raw, "files.parquet", store)["path"]
    return all(is_wanted(path) and path == shorten_path(path) for path in paths)


def _path_filter(spec: SourceSpec) -> PathFilter:
    """Returns the filter of a source's files to fetch: its images, and its table if it has one."""
    return lambda name: is_image(name) or (spec.table is not None and spec.table.is_at(name))


def _list_wanted(spec: SourceSpec) -> list[str]:
    """Returns what the filter depends on: suffixes, and the table's path."""
    return [*IMAGE_SUFFIXES, *([spec.table.file] if spec.table else [])]


def _store_archive(path: Path, spec: SourceSpec, origin: Json, store: Store, settings: Settings) -> str:
    """Stores the images of a downloaded archive and removes it: it is not needed any more, or it is unusable."""
    try:
        with open_archive(path, settings, _path_filter(spec)) as archive:
            require_space([(store.path(""), archive.unpacked_bytes)])
            raw = _store_files(spec, archive, store, {**origin, "archive_sha256": hash_file(path)})
    except SourceError as error:
        path.unlink(missing_ok=True)
        raise SourceError(
            f"{spec.file}: the archive of {_name_origin(origin)} cannot be used: {error}; the download was removed, so "
            "fetching again downloads it anew"
        ) from None
    path.unlink()
    return raw


def _draw_demo(spec: DemoSource, store: Store, settings: Settings) -> str:
    """Draws the demo source's pictures, unless the same ones were drawn before; returns the raw version's id."""
    from ml.data.sources.demo import DRAWING_VERSION, draw_files

    inputs = {"source": spec.name, "images": spec.images, "seed": spec.seed, "drawing": DRAWING_VERSION}
    known = store.memo("draw", inputs)
    if known and store.exists(known["raw"]):
        return str(known["raw"])
    drawn = draw_files(spec.images, spec.seed, settings.worker_count)
    items = ((path, partial(bytes, data)) for path, data in drawn)
    rows, _ = _store_blobs(items, store, None, total=spec.images, what="drawing")
    raw = _create_raw_version(spec, rows, [], store, inputs)
    store.set_memo("draw", inputs, {"raw": raw})
    return raw


def _store_files(
    spec: SourceSpec, files: Files, store: Store, origin: Json, known: dict[str, _Row] | None = None
) -> str:
    """Stores a source's files as a raw version; returns its id. Files in ``known`` are not read again."""
    if not files.images and not files.rejected:
        other = f" ({len(files.skipped)} other files, such as {cut_text(files.skipped[0])})" if files.skipped else ""
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise SourceError(f"{spec.file}: no image files below {_name_origin(origin)}{other}; looked for {suffixes}")
    what = f"fetching {spec.name}"
    rows, rejected = _store_blobs(files.items(), store, known, total=len(files.images), what=what)
    rejected = sorted([*files.rejected, *rejected])
    fatal = next((file for file in rejected if spec.table and spec.table.is_at(file.path)), None)
    if rejected and (fatal or not rows):
        path, _, detail = fatal or rejected[0]
        named = "its table" if fatal else f"none of its {len(rejected)} image files can be taken; the first,"
        raise SourceError(f"{spec.file}: {named} {cut_text(path)}: {detail}")
    return _create_raw_version(spec, rows, files.skipped, store, origin, rejected)


def _name_origin(origin: Json) -> str:
    """Returns where a source's files came from, for a message."""
    named = (origin[name] for name in ("path", "dataset", "url", "archive", "bucket") if origin.get(name))
    return str(next(named, "the source"))


def _create_raw_version(
    spec: SourceSpec,
    rows: list[_Row],
    skipped: list[str],
    store: Store,
    origin: Json,
    rejected: Sequence[RejectedFile] = (),
) -> str:
    """Creates the raw version; returns its id. ``origin`` records where the files came from, for people to read."""
    meta = {
        "source": spec.name,
        "kind": spec.kind,
        "cohort": spec.cohort,
        "files": len(rows),
        "bytes": sum(row.bytes for row in rows),
        "skipped": len(skipped),
        "skipped_names": skipped[:_NAMES_SHOWN],
        **({"rejected": len(rejected)} if rejected else {}),
        "origin": origin,
    }
    listed = [[row.path, row.sha256] for row in rows]
    payload = [spec.name, listed, *([list(map(list, rejected))] if rejected else [])]

    def write(folder: Path) -> None:
        _write_table(rows, {"path": pa.string(), "sha256": pa.string(), "bytes": pa.int64()}, folder / "files.parquet")
        if rejected:
            _write_table(rejected, dict.fromkeys(RejectedFile._fields, pa.string()), folder / "rejected.parquet")

    return store.create("raw", payload, meta, write)


def _write_table(rows: Sequence[_Row | RejectedFile], columns: dict[str, pa.DataType], path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=pa.schema(columns)), path)


def _set_latest(raw: str, spec: SourceSpec, store: Store) -> None:
    """Records the source's latest raw version, which the manifest stage reads by default."""
    ref = f"refs/raw/{spec.name}.json"
    current, tag = store.read(ref)
    if not current or current["raw"] != raw:
        store.compare_and_set(ref, {"raw": raw, "fetched": datetime.now(UTC).isoformat(timespec="seconds")}, tag)


def _store_blobs(
    items: Iterable[FileReader], store: Store, known: dict[str, _Row] | None, *, total: int, what: str
) -> tuple[list[_Row], list[RejectedFile]]:
    """Stores every file as a blob, several at a time; returns their rows, sorted by path, and those that are rejected.

    Files in ``known`` are not read again; the others are added to it, one by one.
    """
    known = {} if known is None else known

    def put(item: FileReader) -> _Row | RejectedFile:
        path, read = item
        if path not in known or not store.path(store.blob_key(known[path].sha256)).exists():
            try:
                data = read()
            except FileRejected as error:
                return error.rejected
            known[path] = _Row(path, store.put_blob(data), len(data))
        return known[path]

    rows: list[_Row] = []
    rejected: list[RejectedFile] = []
    for stored in track(_map_in_threads(put, items), total=total, what=what):
        if isinstance(stored, _Row):
            rows.append(stored)
        else:
            rejected.append(stored)
    return sorted(rows), rejected


def _map_in_threads(function: Callable[[Input], Output], items: Iterable[Input]) -> Iterator[Output]:
    """Maps a function over items in threads; takes items as fast as results are read, so that few are in memory."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Output]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
