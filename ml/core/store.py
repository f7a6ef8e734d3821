"""The store: one root, on disk (``file:///…``) or in S3 (``s3://…``), that every stage reads from and writes to.

Everything under ``objects/`` is immutable and named by its content:

    objects/blobs/<2 hex>/<sha256>             source files, unchanged
    objects/<kind>/<kind>-<12 hex>/…           a stage's output; object.json, written last, marks it as complete and
                                               holds the checksums of its files
    objects/caches/<name>/<part>               pixels and features; each part holds a batch of images
    objects/memos/<name>/<digest>.json         which object a stage made from which inputs

The mutable folders (``refs/``, ``ledgers/``, ``jobs/``, ``audit/``) hold small JSON that changes by compare-and-set. No
reader sees a partial write: a file appears by a rename on disk and by a single PUT in S3, an object by its object.json.
"""

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from filelock import FileLock

from ml.core import s3_access
from ml.core.disks import (
    explained_os_errors,
    refuse_special_file,
    replace_folder,
    scratch_folder,
    write_in_one_step,
)
from ml.core.errors import Conflict, StoreError
from ml.core.hashes import CHECKSUMS, check_file, digest, hash_file, hash_files, object_id
from ml.core.messages import quote_value
from ml.core.stored_json import describe_damage, parse_stored

if TYPE_CHECKING:  # importing it and boto3 takes a tenth of a second, which would delay DAG files
    from cloudpathlib import S3Path

Json = dict[str, Any]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


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
            client = s3_access.make_s3_client(*(variables.get(name) for name in _S3_VARIABLES))
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
            s3_access.upload_file(path, source)
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
        with scratch_folder(self._root / "tmp" if isinstance(self._root, Path) else None) as scratch:
            yield scratch

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
        """Returns whether the store has the complete object. One whose object.json is damaged has to be made again.

        Raises:
            StoreError: the text cannot be an id.
        """
        self.object_key(oid)
        try:
            self._read_object(oid)
        except StoreError:
            return False
        return True

    def create(self, kind: str, payload: object, meta: Json, fill: Callable[[Path], None] | None = None) -> str:
        """Creates an object named by the hash of ``payload`` and returns its id.

        ``fill`` writes the object's files into the folder that it is given; ``meta``, with ``id`` and the checksums of
        the files added, becomes object.json. An object that exists already is left as it is, and ``fill`` is not
        called; one that is damaged is replaced.
        """
        oid = object_id(kind, payload)
        if self._is_intact(oid):
            return oid
        target = self.path(self.object_key(oid))
        with self.staging() as scratch:
            folder = scratch / oid
            folder.mkdir()
            if fill:
                fill(folder)
            checksums = {name: [sha256] for name, sha256 in hash_files(folder).items()}
            content = {**meta, "id": oid, CHECKSUMS: checksums}
            (folder / "object.json").write_text(json.dumps(content, indent=1, sort_keys=True))
            if not isinstance(target, Path):
                s3_access.upload_folder(target, folder, last="object.json")  # which marks the object as complete
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    folder.rename(target)
                except OSError:
                    if not self._is_intact(oid):  # otherwise another writer was first, with the same content
                        replace_folder(folder, target)
        return oid

    def meta(self, oid: str) -> Json:
        """Returns the object.json of an object, without its checksums.

        Raises:
            StoreError: there is no such object, or its file is damaged; the message names kind and store, or the file.
        """
        content = self._read_object(oid)
        content.pop(CHECKSUMS, None)
        return content

    def file(self, oid: str, name: str) -> Path:
        """Returns one file of an object as a local file; from S3 it is downloaded.

        Raises:
            StoreError: there is no such object or file, or the file is not what was written there.
        """
        key = f"{self.object_key(oid)}/{name}"
        file = self.local(key)
        if name != "object.json":
            check_file(file, name, self._read_object(oid), self.uri(key))
        return file

    def replace_file(self, oid: str, name: str, source: Path) -> None:
        """Puts the local file ``source`` in place of an object's file, for an erasure; ``source`` is gone then.

        Both checksums hold in between, so that a process that ends in the middle leaves an object that can be read.
        """
        folder = self.object_key(oid)
        content, sha256 = self._read_object(oid), hash_file(source)
        checksums = content.get(CHECKSUMS)
        if checksums is None:  # an earlier release's: it has none of its other files either
            self.put_file(f"{folder}/{name}", source)
            return
        both, new = [*checksums.get(name, []), sha256], [sha256]
        self.put_json(f"{folder}/object.json", {**content, CHECKSUMS: {**checksums, name: both}})
        self.put_file(f"{folder}/{name}", source)
        self.put_json(f"{folder}/object.json", {**content, CHECKSUMS: {**checksums, name: new}})

    def _is_intact(self, oid: str) -> bool:
        try:
            content = self._read_object(oid)
            for name in content.get(CHECKSUMS, {}):
                key = f"{self.object_key(oid)}/{name}"
                check_file(self.local(key), name, content, self.uri(key))
        except StoreError:
            return False
        return True

    def _read_object(self, oid: str) -> Json:
        kind, key = oid.rpartition("-")[0], f"{self.object_key(oid)}/object.json"
        try:
            data = _read_file(self.path(key))
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.EISDIR}:
                raise describe_damage(self.uri(key), "it is no file") from None
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise
            raise StoreError(f"{quote_value(oid)}: no such {kind or 'object'} in the store {self.root}") from None
        content = self._parse_mapping(data, key)
        if content.get("id") != oid:
            raise describe_damage(self.uri(key), "its id is not that of its folder")
        return content

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
            body, tag = s3_access.read_tagged_object(path)
            return (None, None) if body is None else (parse_stored(body, key, self.uri(key)), tag)
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
            s3_access.write_object_if(path, json.dumps(value, indent=1, sort_keys=True).encode(), expected)
            return
        locks = self.path("tmp/locks")
        assert isinstance(locks, Path)
        with explained_os_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock"):
                if self.read(key)[1] != expected:
                    raise Conflict(f"{self.uri(key)} was changed by another writer; try again")
                self.put_json(key, value)

    def age(self, key: str) -> float | None:
        """Returns the seconds since ``key`` was written, or None if there is no such key.

        Both times are of the store's own clock, that of S3 or of the disk's host, whatever this process's clock shows.
        """
        path = self.path(key)
        if not isinstance(path, Path):
            return s3_access.measure_object_age(path)
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


def _read_file(path: "Path | S3Path") -> bytes:
    if not isinstance(path, Path):
        return s3_access.read_object(path)
    refuse_special_file(path)
    return path.read_bytes()
