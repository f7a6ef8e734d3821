"""Images in an S3 store of somebody's: objects below a prefix, or one archive. Read with boto3."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from ml.core.errors import BreakhisError, CredentialsError, SourceError, TryAgain
from ml.core.progress import say
from ml.core.store import Json
from ml.data.sources.downloads import require_space, save, started, writing
from ml.data.sources.files import MAX_FILE_BYTES, Item, Taken, is_image
from ml.data.sources.spec import S3_KEY_VARIABLES, S3Source

_CHUNK = 1 << 16
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey", "404"})
_ELSEWHERE = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_BUSY = frozenset({"SlowDown", "RequestTimeout"})


class Object(NamedTuple):
    """One object as the listing has it."""

    key: str
    etag: str
    size: int


class Bucket:
    """What a source may read of its bucket: the keys below its prefix.

    Implements :class:`ml.data.sources.files.Files`.

    Raises:
        CredentialsError: no key, or one that may not read this.
        SourceError: there is no such bucket or object, or no S3 server at that address.
        TryAgain: the server cannot be reached or has a fault of its own, or an object was replaced meanwhile.
    """

    def __init__(self, spec: S3Source, taken: Taken = is_image) -> None:
        self._spec = spec
        self._taken = taken
        self.images: list[str] = []
        self.skipped: list[str] = []
        self.objects: dict[str, Object] = {}
        """By name, which is the key below the prefix. Filled by :meth:`list`, as are the other two."""

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        key, secret = (os.environ.get(name) for name in S3_KEY_VARIABLES)
        if any(character.isspace() for character in (key or "") + (secret or "")):
            raise CredentialsError(
                f"{self._spec.file}: the key for {self._name('')} has a blank or a line break in it; copy it again"
            )
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
                if "Name" not in page:
                    raise self._no_s3()
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
                    if name in self.objects:
                        twins = f"{self.objects[name].key!r} and {entry['Key']!r}"
                        raise SourceError(f"{self._name('')}: {twins} differ in slashes alone; rename one of them")
                    self.objects[name] = Object(entry["Key"], entry["ETag"], entry["Size"])
        self.images = sorted(self.objects)
        self.skipped.sort()
        return {
            "bucket": spec.bucket,
            "prefix": spec.prefix,
            "endpoint": spec.endpoint,
            "objects": sorted(self.objects.values()),
        }

    def items(self) -> Iterator[Item]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self._read, self.objects[name])) for name in self.images)

    def look(self) -> Json:
        """What tells the archive from another one under the same key."""
        with self._explained(self._spec.archive):
            head = self._client.head_object(Bucket=self._spec.bucket, Key=self._spec.archive)
        if "ETag" not in head:
            raise self._no_s3()
        return {
            **{"bucket": self._spec.bucket, "archive": self._spec.archive, "endpoint": self._spec.endpoint},
            **{"mark": head["ETag"], "bytes": head["ContentLength"]},
        }

    def download(self, target: Path, identity: Json) -> None:
        """Fetch the archive whole, going on where an earlier try broke off.

        Args:
            target: where to; what comes before the end lies beside it, as ``.part``.
            identity: what :meth:`look` found. Each request asks for this state of the archive or none, so that parts
                of two states cannot meet in one file; another state needs another ``target``.
        """
        spec, part, size = self._spec, target.with_suffix(".part"), identity["bytes"]
        have = started(part)
        with self._explained(spec.archive):
            if have < size:
                say(f"{spec.name}: downloading {self._name(spec.archive)}, {(size - have) / 1e6:,.0f} MB to go")
                require_space([(part, size - have)])
                asked = {"Range": f"bytes={have}-"} if have else {}
                answer = self._client.get_object(
                    Bucket=spec.bucket, Key=spec.archive, IfMatch=identity["mark"], **asked
                )
                with writing(part, on=True) as file:
                    save(answer["Body"].iter_chunks(_CHUNK), file, size - have)
        part.replace(target)

    def _read(self, one: Object) -> bytes:
        with self._explained(one.key):
            answer = self._client.get_object(Bucket=self._spec.bucket, Key=one.key, IfMatch=one.etag)
            data: bytes = answer["Body"].read()
        return data

    def _name(self, key: str) -> str:
        return f"s3://{self._spec.bucket}/{key}"

    @property
    def _where(self) -> str:
        return f"{self._spec.file}: {self._spec.endpoint or 'AWS'}"

    def _no_s3(self) -> SourceError:
        return SourceError(f"{self._where} does not answer as an S3 server; correct 'endpoint'")

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn boto3's exceptions into ours."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            CredentialRetrievalError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )
        from botocore.parsers import ResponseParserError

        spec = self._spec
        try:
            yield
        except ClientError as error:
            raise self._refusal(error, key) from None
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
            how = f"the Airflow connection {spec.connection!r}" if spec.connection else "AWS_ACCESS_KEY_ID and so on"
            raise CredentialsError(
                f"{spec.file}: no key for {self._name(key)} ({error}); set {' and '.join(S3_KEY_VARIABLES)}, or {how}"
            ) from None
        except (ResponseParserError, RecursionError):  # botocore follows a redirect without a region in circles
            raise self._no_s3() from None
        except BotoCoreError as error:
            if isinstance(getattr(error, "kwargs", {}).get("error"), RecursionError):  # caught deep down in a circle
                raise self._no_s3() from None
            raise TryAgain(f"{self._where} cannot be reached or broke off ({error}); try again") from None

    def _refusal(self, error: Any, key: str) -> BreakhisError:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        name, where = self._name(key), self._where
        if code in _REFUSED or status in (401, 403):
            return CredentialsError(f"{where} does not let this key read {name} ({code})")
        if code in _MISSING:
            return SourceError(f"{where} has no {name} ({code})")
        if status == 412:
            return TryAgain(f"{where}: {name} was replaced while it was being fetched; try again")
        if status == 429 or status >= 500 or code in _BUSY:
            # What is no S3 at all and answers with a page is to botocore a fault of the server; the code is a number.
            doubt = "; if that goes on, see whether 'endpoint' is an S3 server" if code.isdigit() else ""
            return TryAgain(f"{where} answers {code} for {name}; try again later{doubt}")
        if code in _ELSEWHERE:
            return SourceError(f"{where}: {name} is not in region {self._spec.region!r} ({code}); correct 'region'")
        return SourceError(f"{where} answers {code} for {name}: {error.response['Error'].get('Message', '')}")
