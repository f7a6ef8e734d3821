"""The store: one root, on disk (``file:///…``) or in S3 (``s3://…``), that every stage reads from and writes to.

Everything under ``objects/`` is immutable and named by its content:

    objects/blobs/<2 hex>/<sha256>             source files, unchanged
    objects/<kind>/<kind>-<12 hex>/…           a stage's output; object.json, written last, marks it as complete
    objects/caches/<name>/<part>               pixels and features; each part holds a batch of images
    objects/memos/<name>/<digest>.json         which object a stage made from which inputs

The mutable folders (``refs/``, ``ledgers/``, ``jobs/``, ``audit/``) hold small JSON that changes by compare-and-set. No
reader sees a partial write: a file appears by a rename on disk and by a single PUT in S3, an object by its object.json.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from filelock import FileLock

from ml.core.disks import explained_os_errors, refuse_special_file, replace_folder, write_in_one_step
from ml.core.errors import Conflict, StoreError, TryAgain
from ml.core.messages import cut_text, hide_access, quote_value
from ml.core.s3_access import find_boto_client, find_outage, make_s3_client, read_object
from ml.core.stored_json import describe_damage, parse_stored

if TYPE_CHECKING:  # importing it and boto3 takes a tenth of a second, which would delay DAG files
    from cloudpathlib import S3Path

Json = dict[str, Any]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SECONDS_UNTIL_ABANDONED = 24 * 3600


def canonical(payload: object) -> bytes:
    """Returns the canonical JSON of a value, which hashes are computed from: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(payload: object) -> str:
    """Returns the SHA-256 (64 hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical(payload)).hexdigest()


def object_id(kind: str, payload: object) -> str:
    """Returns ``<kind>-<12 hex digits of the content's hash>``."""
    return f"{kind}-{digest(payload)[:12]}"


class Store:
    """A store at ``root``. It is cheap to construct and opens nothing until it is used.

    Args:
        root: ``file:///…`` or ``s3://…``.
        environment: mapping with the AWS_* variables of an S3 store; default: this process's environment.

    Raises:
        StoreError: the root is neither file:/// nor s3://.
    """

    def __init__(self, root: str, environment: Mapping[str, str] | None = None) -> None:
        self._root: Path | S3Path
        if root.startswith("file:///"):
            self._root = Path(unquote(root.removeprefix("file://")))  # as Path.as_uri() quotes
        elif root.startswith("s3://"):
            import cloudpathlib

            variables = os.environ if environment is None else environment
            client = make_s3_client(*(variables.get(name) for name in _S3_VARIABLES))
            self._root = cloudpathlib.S3Path(root, client=client)
        else:
            raise StoreError(f"store root {root!r} must begin with file:/// or s3:// (setting BREAKHIS_STORE)")
        self.root = root.rstrip("/")

    def path(self, key: str) -> "Path | S3Path":
        """Returns the path of a key, for reading only; the methods below write."""
        return self._root / key

    def uri(self, key: str) -> str:
        """Returns the URI of a key."""
        return f"{self.root}/{key}"

    def local(self, key: str) -> Path:
        """Returns a local file with the content of ``key``; from S3 it is downloaded.

        Raises:
            StoreError: the key does not exist.
        """
        path = self.path(key)
        if not path.exists():
            raise StoreError(f"{self.uri(key)}: not in the store")
        if not isinstance(path, Path):
            return Path(path.fspath)
        refuse_special_file(path)
        return path

    def put_file(self, key: str, source: Path) -> None:
        """Puts the local file ``source`` at ``key`` in one step. The file is moved, not copied: ``source`` is gone."""
        path = self.path(key)
        if not isinstance(path, Path):
            path.upload_from(source, force_overwrite_to_cloud=True)
            source.unlink()
            return
        with explained_os_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            source.replace(path)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Context manager that makes a scratch folder and removes it afterwards.

        It is on the store's own disk, so that a rename suffices to put a file in place. Folders of killed processes are
        removed by the next call, once nothing has been written to them for a day.

        Raises:
            ConfigError: the disk is full or read-only, or forbids it, also in the block.
        """
        parent = self._root / "tmp" if isinstance(self._root, Path) else None
        with explained_os_errors(parent):
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent, prefix="breakhis-", ignore_cleanup_errors=True) as scratch:
                if parent:
                    # Both times are the disk's: a host whose clock is ahead would remove what others are writing.
                    now = Path(scratch).stat().st_mtime
                    for folder in parent.iterdir():
                        if now - _last_modified(folder) > _SECONDS_UNTIL_ABANDONED:
                            shutil.rmtree(folder, ignore_errors=True)
                yield Path(scratch)

    # --- source files -------------------------------------------------------------------------------------------

    @staticmethod
    def blob_key(sha256: str) -> str:
        """Returns the key of the file with this hash."""
        return f"objects/blobs/{sha256[:2]}/{sha256}"

    def put_blob(self, data: bytes) -> str:
        """Stores the bytes of one file and returns their SHA-256. Identical bytes are stored once."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(self.blob_key(sha256))
        if path.exists():
            return sha256
        if isinstance(path, Path):
            write_in_one_step(path, data)
        else:
            path.write_bytes(data)
        return sha256

    def blob(self, sha256: str) -> bytes:
        """Returns the bytes of the file with this hash.

        Raises:
            StoreError: there is no such file.
        """
        path = self.path(self.blob_key(sha256))
        try:
            if not isinstance(path, Path):
                return read_object(path)
            return _read_file(path)
        except FileNotFoundError:
            raise StoreError(f"{self.uri(self.blob_key(sha256))}: not in the store") from None

    def open_blob(self, sha256: str) -> BinaryIO:
        """Opens the file with this hash. A file on disk is not read into memory as a whole.

        Raises:
            StoreError: there is no such file.
        """
        path = self.path(self.blob_key(sha256))
        if not isinstance(path, Path):
            return io.BytesIO(self.blob(sha256))
        refuse_special_file(path)
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise StoreError(f"{self.uri(self.blob_key(sha256))}: not in the store") from None

    # --- objects: the output of stages --------------------------------------------------------------------------

    @staticmethod
    def object_key(oid: str) -> str:
        """Returns the key of an object's folder.

        Raises:
            StoreError: the text cannot be an id: it is empty, too long, or has characters that no id has.
        """
        if not _ID.fullmatch(oid):
            raise StoreError(
                f"{quote_value(oid)} is no id; give one that a stage printed, such as dataset-0123456789ab"
            )
        return f"objects/{oid.rpartition('-')[0]}/{oid}"

    def exists(self, oid: str) -> bool:
        """Returns whether the store has the complete object."""
        return self.path(f"{self.object_key(oid)}/object.json").exists()

    def create(self, kind: str, payload: object, meta: Json, fill: Callable[[Path], None] | None = None) -> str:
        """Creates an object named by the hash of ``payload`` and returns its id.

        ``fill`` writes the object's files into the folder that it is given; ``meta``, with ``id`` added, becomes
        object.json. An object that exists already is left as it is, and ``fill`` is not called.
        """
        oid = object_id(kind, payload)
        if self.exists(oid):
            return oid
        target = self.path(self.object_key(oid))
        with self.staging() as scratch:
            folder = scratch / oid
            folder.mkdir()
            if fill:
                fill(folder)
            (folder / "object.json").write_text(json.dumps({"id": oid, **meta}, indent=1, sort_keys=True))
            if not isinstance(target, Path):
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                files.sort(key=lambda path: path == folder / "object.json")  # marks the object as complete: last
                for file in files:
                    (target / file.relative_to(folder).as_posix()).upload_from(file, force_overwrite_to_cloud=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    folder.rename(target)
                except OSError:
                    if not self.exists(oid):  # otherwise another writer was first, with the same content
                        replace_folder(folder, target)
        return oid

    def meta(self, oid: str) -> Json:
        """Returns the object.json of an object.

        Raises:
            StoreError: there is no such object, or its file is damaged; the message names kind and store, or the file.
        """
        kind, key = oid.rpartition("-")[0], f"{self.object_key(oid)}/object.json"
        try:
            data = _read_file(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{quote_value(oid)}: no such {kind or 'object'} in the store {self.root}") from None
        return self._parse_mapping(data, key)

    def file(self, oid: str, name: str) -> Path:
        """Returns one file of an object as a local file; see :meth:`local`."""
        return self.local(f"{self.object_key(oid)}/{name}")

    # --- memos: results of stages by their inputs ---------------------------------------------------------------

    def memo(self, name: str, inputs: object) -> Json | None:
        """Returns the result that a stage stored for these inputs, or None.

        Raises:
            StoreError: its file is damaged, or holds something else.
        """
        key = f"objects/memos/{name}/{digest(inputs)}.json"
        try:
            data = _read_file(self.path(key))
        except FileNotFoundError:
            return None
        return self._parse_mapping(data, key)

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Stores the result of a stage for these inputs."""
        self.put_json(f"objects/memos/{name}/{digest(inputs)}.json", result)

    # --- mutable values -----------------------------------------------------------------------------------------

    def put_json(self, key: str, value: object) -> None:
        """Writes small JSON at ``key`` in one step and replaces any earlier value."""
        path = self.path(key)
        text = json.dumps(value, indent=1, sort_keys=True)
        if not isinstance(path, Path):
            path.write_text(text)
            return
        with self.staging() as scratch:
            file = scratch / "value.json"
            file.write_text(text)
            self.put_file(key, file)

    def read(self, key: str) -> tuple[Any, str | None]:
        """Returns the JSON at ``key`` and its version tag for :meth:`compare_and_set`, or ``(None, None)``.

        Raises:
            StoreError: what is there is no JSON, or not what is kept at such a key.
        """
        path = self.path(key)
        if not isinstance(path, Path):
            s3 = find_boto_client(path)
            try:
                answer = s3.get_object(Bucket=path.bucket, Key=path.key)
            except s3.exceptions.NoSuchKey:
                return None, None
            return parse_stored(answer["Body"].read(), key, self.uri(key)), answer["ETag"]
        try:
            data = _read_file(path)
        except FileNotFoundError:
            return None, None
        return parse_stored(data, key, self.uri(key)), hashlib.sha256(data).hexdigest()

    def _parse_mapping(self, data: bytes, key: str) -> Json:
        value = parse_stored(data, key, self.uri(key))
        if not isinstance(value, dict):
            raise describe_damage(self.uri(key), "it holds no JSON object")
        return value

    def compare_and_set(self, key: str, value: object, expected: str | None) -> None:
        """Writes small JSON if the key still has the version tag ``expected`` (None: the key must not exist yet).

        Raises:
            Conflict: another writer changed the key in between; the caller has to read and decide again.
            TryAgain: S3 did not accept the write.
        """
        path = self.path(key)
        if not isinstance(path, Path):
            self._compare_and_set_s3(path, value, expected)
            return
        locks = self.path("tmp/locks")
        assert isinstance(locks, Path)
        with explained_os_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock"):
                if self.read(key)[1] != expected:
                    raise Conflict(f"{self.uri(key)} was changed by another writer; try again")
                self.put_json(key, value)

    def _compare_and_set_s3(self, path: "S3Path", value: object, expected: str | None) -> None:
        s3 = find_boto_client(path)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        body = json.dumps(value, indent=1, sort_keys=True).encode()
        try:
            s3.put_object(Bucket=path.bucket, Key=path.key, Body=body, **condition)
        except s3.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}:
                raise Conflict(f"{path} was changed by another writer; try again") from None
            raise find_outage(error) or TryAgain(f"{path}: {cut_text(hide_access(error))}") from error

    def age(self, key: str) -> float | None:
        """Returns the seconds since ``key`` was written, or None if there is no such key.

        Both times are of the store's own clock, that of S3 or of the disk's host, whatever this process's clock shows.
        """
        path = self.path(key)
        if not isinstance(path, Path):
            s3 = find_boto_client(path)
            try:
                answer = s3.get_object(Bucket=path.bucket, Key=path.key)
            except s3.exceptions.NoSuchKey:
                return None
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            return float((now - answer["LastModified"]).total_seconds())
        try:
            with self.staging() as scratch:
                return scratch.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return None

    def remove(self, key: str) -> None:
        """Deletes a key if it exists. Meant for mutable values and cache parts; objects are never deleted."""
        self.path(key).unlink(missing_ok=True)

    def caches(self, kind: str) -> list[str]:
        """Returns the folders of every cache of a kind, such as ``pixels``, of whatever version."""
        return [f"objects/caches/{name}" for name in self.keys("objects/caches") if name.startswith(f"{kind}-")]

    def keys(self, prefix: str) -> list[str]:
        """Returns the sorted names directly below a prefix, without hidden ones."""
        path = self.path(prefix)
        if not path.exists():
            return []
        return sorted(child.name for child in path.iterdir() if not child.name.startswith("."))


_S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def _last_modified(folder: Path) -> float:
    """Returns when a folder was last written to (seconds since the epoch), or now if the folder is gone.

    Other processes remove their folders meanwhile. The answer changes with time, so it must not be cached.
    """
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _read_file(path: "Path | S3Path") -> bytes:
    if isinstance(path, Path):
        refuse_special_file(path)
    return path.read_bytes()
