"""The store: one root, on disk (``file:///…``) or in S3 (``s3://…``), that every stage reads from and writes to.

What lies under ``objects/`` is immutable and named by content:

    objects/blobs/<2 hex>/<sha256>             files as they came
    objects/<kind>/<kind>-<12 hex>/…           what a stage made; object.json, written last, says that it is whole
    objects/caches/<name>/<part>               pixels and features, a part a batch of images
    objects/memos/<name>/<digest>.json         which object came out of which inputs

What moves (``refs/``, ``ledgers/``, ``jobs/``, ``audit/``) is small JSON and changes by compare-and-set. A reader never
sees half of anything: files appear by rename on disk and by a single PUT in S3, directories by their object.json.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import unquote

from filelock import FileLock

from ml.core.errors import Conflict, StoreError, TryAgain

if TYPE_CHECKING:  # with boto3 they take a tenth of a second, which DAG files need not wait for
    from cloudpathlib import S3Client, S3Path

Json = dict[str, Any]

_SECONDS_UNTIL_LEFT_BEHIND = 24 * 3600


def canonical(payload: object) -> bytes:
    """The one JSON spelling of a value that hashes are taken of: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(payload: object) -> str:
    """SHA-256 (64 hex) of a JSON value in its canonical spelling."""
    return hashlib.sha256(canonical(payload)).hexdigest()


def object_id(kind: str, payload: object) -> str:
    """``<kind>-<12 hex of the content's hash>``."""
    return f"{kind}-{digest(payload)[:12]}"


class Store:
    """A store at ``root``. Cheap to make; opens nothing until it is used.

    Args:
        root: ``file:///…`` or ``s3://…``.
        environment: where the AWS_* variables of an S3 store are; default: this process's.

    Raises:
        StoreError: the root is neither file:/// nor s3://, or an id is unknown.
    """

    def __init__(self, root: str, environment: Mapping[str, str] | None = None) -> None:
        self._root: Path | S3Path
        if root.startswith("file:///"):
            self._root = Path(unquote(root.removeprefix("file://")))  # as Path.as_uri() quotes
        elif root.startswith("s3://"):
            import cloudpathlib

            known = os.environ if environment is None else environment
            self._root = cloudpathlib.S3Path(root, client=_client(*(known.get(name) for name in _S3_VARIABLES)))
        else:
            raise StoreError(f"store root {root!r} must begin with file:/// or s3:// (setting BREAKHIS_STORE)")
        self.root = root.rstrip("/")

    def path(self, key: str) -> "Path | S3Path":
        """Where a key lies. For reading; writing goes through the methods below."""
        return self._root / key

    def uri(self, key: str) -> str:
        """The key's address as a URI."""
        return f"{self.root}/{key}"

    def local(self, key: str) -> Path:
        """A local file with the content of ``key``; in S3 it is downloaded.

        Raises:
            StoreError: nothing lies there.
        """
        path = self.path(key)
        if not path.exists():
            raise StoreError(f"{self.uri(key)}: not in the store")
        return path if isinstance(path, Path) else Path(path.fspath)

    def put_file(self, key: str, source: Path) -> None:
        """Make ``source`` (a local file) appear whole at ``key``. On disk the file is moved there, not copied."""
        path = self.path(key)
        if not isinstance(path, Path):
            path.upload_from(source, force_overwrite_to_cloud=True)
            source.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            source.replace(path)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A scratch folder on the store's own disk (so that a rename suffices), removed afterwards.

        Those of processes that were killed are removed by the next one, once nothing has come into them for a day.
        """
        if not isinstance(self._root, Path):
            parent = None
        else:
            parent = self._root / "tmp"
            parent.mkdir(parents=True, exist_ok=True)
            for one in parent.iterdir():
                if time.time() - _last_touched(one) > _SECONDS_UNTIL_LEFT_BEHIND:
                    shutil.rmtree(one, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="breakhis-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    # --- files as they came -------------------------------------------------------------------------------------

    @staticmethod
    def blob_key(sha256: str) -> str:
        """Where a file with this hash lies."""
        return f"objects/blobs/{sha256[:2]}/{sha256}"

    def put_blob(self, data: bytes) -> str:
        """Keep the bytes of one file; returns their SHA-256. The same bytes are kept once."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(self.blob_key(sha256))
        if path.exists():
            return sha256
        if not isinstance(path, Path):
            path.write_bytes(data)
            return sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and hidden, so that a rename within one folder makes it appear.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return sha256

    def blob(self, sha256: str) -> bytes:
        """The bytes of a file by its hash.

        Raises:
            StoreError: no such file.
        """
        path = self.path(self.blob_key(sha256))
        try:
            if not isinstance(path, Path):  # not by way of a copy on disk, which would be kept
                return _get(path)
            return path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{self.uri(self.blob_key(sha256))}: not in the store") from None

    def open_blob(self, sha256: str) -> BinaryIO:
        """The open file with this hash: of a large one on disk only what is being read is in memory.

        Raises:
            StoreError: no such file.
        """
        path = self.path(self.blob_key(sha256))
        if not isinstance(path, Path):
            return io.BytesIO(self.blob(sha256))
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise StoreError(f"{self.uri(self.blob_key(sha256))}: not in the store") from None

    # --- what stages make ---------------------------------------------------------------------------------------

    @staticmethod
    def object_key(oid: str) -> str:
        """The folder of an object."""
        return f"objects/{oid.rpartition('-')[0]}/{oid}"

    def exists(self, oid: str) -> bool:
        """Whether an object is there, whole."""
        return self.path(f"{self.object_key(oid)}/object.json").exists()

    def create(self, kind: str, payload: object, meta: Json, fill: Callable[[Path], None] | None = None) -> str:
        """Make an object named by the hash of ``payload``; returns its id.

        ``fill`` writes the object's files into the folder it is given; ``meta`` becomes object.json (with ``id``
        added). An object that is there already is left as it is, and ``fill`` is not called.
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
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                files.sort(key=lambda p: p == folder / "object.json")  # the sign that the rest is there comes last
                for file in files:
                    (target / file.relative_to(folder).as_posix()).upload_from(file, force_overwrite_to_cloud=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    folder.rename(target)
                except OSError:
                    if not self.exists(oid):  # else another writer came first, with the same content
                        raise
        return oid

    def meta(self, oid: str) -> Json:
        """The object.json of an object.

        Raises:
            StoreError: no such object; says which kinds of id there are.
        """
        kind = oid.rpartition("-")[0]
        try:
            return cast(Json, json.loads(self.path(f"{self.object_key(oid)}/object.json").read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{oid!r}: no such {kind or 'object'} in the store {self.root}") from None

    def file(self, oid: str, name: str) -> Path:
        """One file of an object, as a local file."""
        return self.local(f"{self.object_key(oid)}/{name}")

    # --- memos --------------------------------------------------------------------------------------------------

    def memo(self, name: str, inputs: object) -> Json | None:
        """What a stage made of these inputs earlier, or None."""
        try:
            text = self.path(f"objects/memos/{name}/{digest(inputs)}.json").read_text()
        except FileNotFoundError:
            return None
        return cast(Json, json.loads(text))

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Remember what a stage made of these inputs."""
        self.put_json(f"objects/memos/{name}/{digest(inputs)}.json", result)

    # --- what moves ---------------------------------------------------------------------------------------------

    def put_json(self, key: str, value: object) -> None:
        """Write small JSON at ``key``, whole, whatever was there."""
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
        """The JSON at ``key`` and its version tag for :meth:`compare_and_set`; ``(None, None)`` where nothing lies."""
        path = self.path(key)
        if not isinstance(path, Path):
            s3 = _s3(path)
            try:
                answer = s3.get_object(Bucket=path.bucket, Key=path.key)
            except s3.exceptions.NoSuchKey:
                return None, None
            return json.loads(answer["Body"].read()), answer["ETag"]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None, None
        return json.loads(data), hashlib.sha256(data).hexdigest()

    def compare_and_set(self, key: str, value: object, expected: str | None) -> None:
        """Write small JSON if the key still has the version tag ``expected`` (None: nothing lies there yet).

        Raises:
            Conflict: somebody else wrote in between; read again and decide anew.
        """
        path = self.path(key)
        if not isinstance(path, Path):
            self._compare_and_set_s3(path, value, expected)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        locks = self.path("tmp/locks")
        assert isinstance(locks, Path)
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock"):
            if self.read(key)[1] != expected:
                raise Conflict(f"{self.uri(key)} was changed by another writer; try again")
            self.put_json(key, value)

    def _compare_and_set_s3(self, path: "S3Path", value: object, expected: str | None) -> None:
        s3 = _s3(path)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        body = json.dumps(value, indent=1, sort_keys=True).encode()
        try:
            s3.put_object(Bucket=path.bucket, Key=path.key, Body=body, **condition)
        except s3.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}:
                raise Conflict(f"{path} was changed by another writer; try again") from None
            raise TryAgain(f"{path}: {error}") from error

    def remove(self, key: str) -> None:
        """Take away what lies there, if anything does. For what moves; objects stay."""
        self.path(key).unlink(missing_ok=True)

    def caches(self, kind: str) -> list[str]:
        """The folders of every cache of a kind, such as ``pixels``, whatever made it."""
        return [f"objects/caches/{name}" for name in self.keys("objects/caches") if name.startswith(f"{kind}-")]

    def keys(self, prefix: str) -> list[str]:
        """The names directly below a prefix, sorted; hidden names are left out."""
        path = self.path(prefix)
        if not path.exists():
            return []
        return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


_S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def _last_touched(folder: Path) -> float:
    """Returns when something last came into a folder (seconds since the epoch), or now if the folder is gone.

    Other processes remove their folders meanwhile. The answer changes with time, so it must not be cached.
    """
    try:
        return max(one.stat().st_mtime for one in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


@cache
def _client(endpoint: str | None, key: str | None, secret: str | None, token: str | None) -> "S3Client":
    """Returns the process's one client for these credentials.

    Making a client takes a good part of a second, and a store is made for each picture.
    """
    from cloudpathlib import S3Client

    return S3Client(endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=token)


def _get(path: "S3Path") -> bytes:
    s3 = _s3(path)
    try:
        data: bytes = s3.get_object(Bucket=path.bucket, Key=path.key)["Body"].read()
    except s3.exceptions.NoSuchKey:
        raise FileNotFoundError(str(path)) from None
    return data


def _s3(path: "S3Path") -> Any:
    return path.client.client


def write_result(uri: str, result: Json) -> None:
    """Write a stage's JSON result to any path or URI, whole (``--result URI``)."""
    if uri.startswith("s3://"):
        root, _, name = uri.rpartition("/")
        Store(root).put_json(name, result)
        return
    path = Path(unquote(uri.removeprefix("file://"))) if uri.startswith("file://") else Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, prefix=".") as file:
        json.dump(result, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
