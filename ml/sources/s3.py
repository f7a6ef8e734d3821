"""Images in an S3 store of somebody's: objects below a prefix, or one archive. Read with boto3."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ml.errors import CredentialsError, SourceError, TryAgain
from ml.sources.downloads import save
from ml.sources.files import MAX_FILE_BYTES, Item, Taken, is_image
from ml.sources.spec import KEY_VARIABLES, S3Source
from ml.store import Json

_CHUNK = 1 << 16
_REFUSED = frozenset({"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey", "404"})


class Bucket:
    """What a source may read of its bucket; implements :class:`ml.sources.files.Files` for the keys below its prefix.

    Raises:
        CredentialsError: no key, or one that may not read this.
        SourceError: there is no such bucket or object.
        TryAgain: the server cannot be reached or has a fault of its own.
    """

    def __init__(self, spec: S3Source, taken: Taken = is_image) -> None:
        self._spec = spec
        self._taken = taken
        self.images: list[str] = []
        self.skipped: list[str] = []
        self._objects: dict[str, list[Any]] = {}  # name -> key, ETag, size

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        key, secret = (os.environ.get(name) for name in KEY_VARIABLES)
        # Addresses with the bucket in their path: few servers other than AWS have a name for each bucket.
        path_style = {"addressing_style": "path"} if self._spec.endpoint else {}
        return boto3.client(
            "s3",
            endpoint_url=self._spec.endpoint or None,
            region_name=self._spec.region,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(s3=path_style, retries={"mode": "standard", "max_attempts": 5}),
        )

    def list(self) -> Json:
        """Find the images; returns what tells this state of the bucket from another one."""
        spec = self._spec
        with self._explained(spec.prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=spec.bucket, Prefix=spec.prefix):
                for entry in page.get("Contents", []):
                    name = entry["Key"].removeprefix(spec.prefix).lstrip("/")
                    if entry["Key"].endswith("/"):  # what some clients make for a folder
                        continue
                    if not self._taken(name):
                        self.skipped.append(name)
                        continue
                    if entry["Size"] > MAX_FILE_BYTES:
                        raise SourceError(
                            f"{self._name(entry['Key'])}: {entry['Size']:,} bytes, more than {MAX_FILE_BYTES:,}"
                        )
                    if name in self._objects:
                        twins = f"{self._objects[name][0]!r} and {entry['Key']!r}"
                        raise SourceError(f"{self._name('')}: {twins} differ in slashes alone; rename one of them")
                    self._objects[name] = [entry["Key"], entry["ETag"], entry["Size"]]
        self.images = sorted(self._objects)
        self.skipped.sort()
        return {
            "bucket": spec.bucket,
            "prefix": spec.prefix,
            "endpoint": spec.endpoint,
            "objects": sorted(self._objects.values()),
        }

    def items(self) -> Iterator[Item]:
        """See :meth:`ml.sources.files.Files.items`."""
        return ((name, partial(self._read, self._objects[name][0])) for name in self.images)

    def look(self) -> Json:
        """What tells the archive from another one under the same key."""
        with self._explained(self._spec.archive):
            head = self._client.head_object(Bucket=self._spec.bucket, Key=self._spec.archive)
        return {
            **{"bucket": self._spec.bucket, "archive": self._spec.archive, "endpoint": self._spec.endpoint},
            **{"mark": head["ETag"], "bytes": head["ContentLength"]},
        }

    def download(self, target: Path, identity: Json) -> None:
        """Fetch the archive whole; an error leaves nothing at ``target``."""
        key, scratch = self._spec.archive, target.with_suffix(".part")
        try:
            with self._explained(key), scratch.open("wb") as file:
                # Of the state that was looked at, or not at all.
                body = self._client.get_object(Bucket=self._spec.bucket, Key=key, IfMatch=identity["mark"])["Body"]
                save(body.iter_chunks(_CHUNK), file, identity["bytes"])
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    def _read(self, key: str) -> bytes:
        with self._explained(key):
            data: bytes = self._client.get_object(Bucket=self._spec.bucket, Key=key)["Body"].read()
        return data

    def _name(self, key: str) -> str:
        return f"s3://{self._spec.bucket}/{key}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn boto3's exceptions into ours."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        spec = self._spec
        where = f"{spec.file}: {spec.endpoint or 'AWS'}"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            how = f"the Airflow connection {spec.connection!r}" if spec.connection else "AWS_ACCESS_KEY_ID and so on"
            raise CredentialsError(
                f"{spec.file}: no key for {self._name(key)}; set {' and '.join(KEY_VARIABLES)}, or {how}"
            ) from None
        except ClientError as error:
            code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
            if code in _REFUSED or status in (401, 403):
                raise CredentialsError(f"{where} does not let this key read {self._name(key)} ({code})") from None
            if code in _MISSING:
                raise SourceError(f"{where} has no {self._name(key)} ({code})") from None
            raise TryAgain(f"{where} answered {code} for {self._name(key)}; try again") from None
        except BotoCoreError as error:
            raise TryAgain(f"{where} cannot be reached or broke off ({error}); try again") from None
