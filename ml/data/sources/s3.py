"""Images in an S3 bucket: objects below a prefix, or one archive. Read with boto3."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.messages import cut_text, hide_access, quote_value
from ml.core.progress import say
from ml.core.s3_access import STORE_KEY_VARIABLES, explain_configuration, explained_setup, require_whole_key
from ml.core.settings import Settings
from ml.core.store import Json
from ml.data.sources.downloads import (
    SourceTooLarge,
    count_downloaded_bytes,
    open_partial,
    require_allowed,
    require_space,
    write_with_progress,
)
from ml.data.sources.files import (
    MAX_FILE_BYTES,
    FileReader,
    PathFilter,
    RejectedFile,
    is_image,
    reject_large_file,
    require_allowed_count,
    shorten_path,
)
from ml.data.sources.spec import S3_KEY_VARIABLES, S3Source
from ml.data.sources.speed_limit import TooSlow

_CHUNK = 1 << 16
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey", "404"})
_ELSEWHERE = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_BUSY = frozenset({"SlowDown", "RequestTimeout"})


class Object(NamedTuple):
    """An object, as the bucket's listing describes it."""

    key: str
    etag: str
    size: int


class Bucket:
    """The part of a bucket that a source reads: the keys below its prefix, or one archive.

    Implements :class:`ml.data.sources.files.Files`.

    Raises:
        CredentialsError: there is no key, or it may not read this.
        ConfigError: a variable for S3, or a file that one names, is invalid.
        SourceError: there is no such bucket or object, no S3 server at that address, or more objects than the settings
            allow.
        TryAgain: the server cannot be reached or has an internal error, or an object was replaced meanwhile.
    """

    def __init__(self, spec: S3Source, settings: Settings, is_wanted: PathFilter = is_image) -> None:
        self._spec = spec
        self._settings = settings
        self._is_wanted = is_wanted
        self.images: list[str] = []
        self.skipped: list[str] = []
        self.rejected: list[RejectedFile] = []
        self.objects: dict[str, Object] = {}
        """The objects by name, the key below the prefix. :meth:`list_objects` fills this and the lists."""

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        own = {name: os.environ.get(name) for name in S3_KEY_VARIABLES}
        usual = {name: os.environ.get(name) for name in (*STORE_KEY_VARIABLES, "AWS_SESSION_TOKEN")}
        key, secret = own.values()
        # Addresses with the bucket in their path: few servers other than AWS have a host name for each bucket.
        path_style = {"addressing_style": "path"} if self._spec.endpoint else {}
        endpoints = {"'endpoint'": self._spec.endpoint} if self._spec.endpoint else None
        try:
            require_whole_key(own if any(own.values()) else usual)
            with explained_setup(endpoints, has_key=bool(key)):
                return boto3.client(
                    "s3",
                    endpoint_url=self._spec.endpoint or None,
                    region_name=self._spec.region,
                    aws_access_key_id=key or None,
                    aws_secret_access_key=secret or None,
                    config=Config(s3=path_style, retries={"mode": "standard", "max_attempts": 5}),
                )
        except (ConfigError, CredentialsError) as error:
            raise type(error)(f"{self._spec.file}: {self._uri('')}: {error}") from None

    @property
    def _key_places(self) -> str:
        """Where this source's key is taken from, in words."""
        connection = self._spec.connection
        how = f"the Airflow connection {connection!r}" if connection else "AWS_ACCESS_KEY_ID and so on"
        return f"{' and '.join(S3_KEY_VARIABLES)}, or {how}"

    def list_objects(self) -> Json:
        """Lists the images; returns the identity of the bucket's state, which differs from any other state's."""
        spec, count = self._spec, 0
        with self._translated_errors(spec.prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=spec.bucket, Prefix=spec.prefix):
                if "Name" not in page:
                    raise self._not_s3_error()
                count += len(page.get("Contents", []))  # at most a thousand
                require_allowed_count(count, self._settings.archive_entries, f"{spec.file}: {self._uri(spec.prefix)}")
                for entry in page.get("Contents", []):
                    if not {"Key", "ETag", "Size"} <= entry.keys() or entry["Size"] < 0:
                        raise self._not_s3_error()
                    self._add_object(Object(entry["Key"], entry["ETag"], entry["Size"]))
                if page.get("IsTruncated") and not page.get("NextContinuationToken"):  # boto3 takes it for the end
                    raise TryAgain(f"{self._server}: the listing breaks off in {self._uri(spec.prefix)}; try again")
        size = sum(entry.size for entry in self.objects.values())
        require_allowed(size, spec.max_bytes, f"{spec.file}: {self._uri(spec.prefix)}")
        self.images = sorted(self.objects)
        self.skipped.sort()
        return {
            "bucket": spec.bucket,
            "prefix": spec.prefix,
            "endpoint": spec.endpoint,
            "objects": sorted(self.objects.values()),
            **({"rejected": sorted(self.rejected)} if self.rejected else {}),
        }

    def _add_object(self, entry: Object) -> None:
        """Takes an object from the listing, or leaves it aside."""
        if entry.key.endswith("/"):  # some clients make this for a folder
            return
        name = shorten_path(entry.key.removeprefix(self._spec.prefix).lstrip("/"))
        if not self._is_wanted(name):
            self.skipped.append(name)
            return
        if entry.size > MAX_FILE_BYTES:
            self.rejected.append(reject_large_file(name, entry.size))
            return
        first = self.objects.setdefault(name, entry)
        if first != entry:
            twins = f"{quote_value(first.key)} and {quote_value(entry.key)}"
            detail = f"{twins} differ in slashes alone, and the first is taken; rename one of them"
            self.rejected.append(RejectedFile(name, "name", detail))

    def items(self) -> Iterator[FileReader]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self._read, self.objects[name])) for name in self.images)

    def identify_archive(self) -> Json:
        """Returns the archive's identity, which differs from that of another archive under the same key."""
        with self._translated_errors(self._spec.archive):
            head = self._client.head_object(Bucket=self._spec.bucket, Key=self._spec.archive)
        if "ETag" not in head or head.get("ContentLength", -1) < 0:
            raise self._not_s3_error()
        return {
            **{"bucket": self._spec.bucket, "archive": self._spec.archive, "endpoint": self._spec.endpoint},
            **{"mark": head["ETag"], "bytes": head["ContentLength"]},
        }

    def download_archive(self, target: Path, identity: Json) -> None:
        """Downloads the archive whole, resuming an interrupted download.

        Args:
            target: the file to write; a partial download lies beside it, as ``.part``.
            identity: the result of :meth:`identify_archive`. Each request asks for this state of the archive alone, so
                that parts of two states cannot end up in one file; another state needs another ``target``.

        Raises:
            SourceTooLarge: it is more than ``max_bytes``, or more than the server said; nothing of it is kept.
            TryAgain: the download broke off; the partial download is kept for the next try.
        """
        from botocore.exceptions import FlexibleChecksumError

        part = target.with_suffix(".part")
        with self._translated_errors(self._spec.archive):
            try:
                self._download_rest(part, count_downloaded_bytes(part), identity)
            except (SourceTooLarge, FlexibleChecksumError):  # what has come is not the archive
                part.unlink(missing_ok=True)
                raise
        part.replace(target)

    def _download_rest(self, part: Path, have: int, identity: Json) -> None:
        """Downloads what follows the first ``have`` bytes of the archive."""
        spec, size, uri = self._spec, identity["bytes"], self._uri(self._spec.archive)
        require_allowed(size, spec.max_bytes, f"{spec.file}: {uri}")
        if have == size:
            return
        say(f"{spec.name}: downloading {uri}, {(size - have) / 1e6:,.0f} MB to go")
        require_space([(part, size - have)])
        byte_range = {"Range": f"bytes={have}-"} if have else {}
        response = self._client.get_object(Bucket=spec.bucket, Key=spec.archive, IfMatch=identity["mark"], **byte_range)
        resumed = response.get("ContentRange", "").startswith(f"bytes {have}-")  # a server may ignore ranges
        left = size - have if resumed else size
        with open_partial(part, resume=resumed) as file:
            write_with_progress(response["Body"].iter_chunks(_CHUNK), file, left, left, f"{spec.file}: {uri}")
        if (came := count_downloaded_bytes(part)) < size:
            raise TryAgain(f"{self._server}: {uri} ended after {came:,} of {size:,} bytes; try again")

    def _read(self, entry: Object) -> bytes:
        with self._translated_errors(entry.key):
            response = self._client.get_object(Bucket=self._spec.bucket, Key=entry.key, IfMatch=entry.etag)
            # At most a byte too many is held in memory; boto3 verifies a checksum once it has read the end.
            with response["Body"] as body:
                data: bytes = body.read(entry.size + 1)
                is_longer = len(data) > entry.size or bool(body.read(1))
        if len(data) < entry.size or is_longer:
            came = "sends more than" if is_longer else f"ended after {len(data):,} of"
            uri = self._uri(entry.key)
            raise TryAgain(f"{self._server}: {uri} {came} the {entry.size:,} bytes that were listed; try again")
        return data

    def _uri(self, key: str) -> str:
        return f"s3://{self._spec.bucket}/{key}"

    @property
    def _server(self) -> str:
        return f"{self._spec.file}: {self._spec.endpoint or 'AWS'}"

    def _not_s3_error(self) -> SourceError:
        return SourceError(f"{self._server} does not answer as an S3 server; correct 'endpoint'")

    @contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Turns boto3's exceptions into ours."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        spec = self._spec
        try:
            yield
        except TooSlow as error:
            raise TryAgain(f"{self._server} {error}, of {self._uri(key)}; try again") from None
        except ClientError as error:
            raise self._translate_error(error, key) from None
        except (ResponseParserError, RecursionError):  # botocore follows a redirect without a region in circles
            raise self._not_s3_error() from None
        except BotoCoreError as error:
            if isinstance(getattr(error, "kwargs", {}).get("error"), RecursionError):  # caught inside such a circle
                raise self._not_s3_error() from None
            if explained := explain_configuration(error, self._key_places):
                raise type(explained)(f"{spec.file}: {self._uri(key)}: {explained}") from None
            reason = cut_text(hide_access(error))
            raise TryAgain(f"{self._server} cannot be reached or broke off ({reason}); try again") from None
        except HTTPError as error:  # while the content came, which boto3 leaves as it is
            raise TryAgain(
                f"{self._server} broke off {self._uri(key)} ({cut_text(hide_access(error))}); try again"
            ) from None
        except (KeyError, ValueError):  # a size that is none, an entry without a key, an odd address
            raise self._not_s3_error() from None

    def _translate_error(self, error: Any, key: str) -> BreakhisError:
        """Returns our exception for an S3 server's refusal."""
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        uri, server = self._uri(key), self._server
        if code in _REFUSED or status in (401, 403):
            return CredentialsError(f"{server} does not let this key read {uri} ({code})")
        if code in _MISSING:
            return SourceError(f"{server} has no {uri} ({code})")
        if status == 412:
            return TryAgain(f"{server}: {uri} was replaced while it was being fetched; try again")
        if status == 429 or status >= 500 or code in _BUSY:
            # To botocore, a server that is not S3 and answers with a page has an internal error; its code is a number.
            hint = "; if that goes on, see whether 'endpoint' is an S3 server" if code.isdigit() else ""
            return TryAgain(f"{server} answers {code} for {uri}; try again later{hint}")
        if code in _ELSEWHERE:
            return SourceError(f"{server}: {uri} is not in region {self._spec.region!r} ({code}); correct 'region'")
        return SourceError(f"{server} answers {code} for {uri}: {error.response['Error'].get('Message', '')}")
