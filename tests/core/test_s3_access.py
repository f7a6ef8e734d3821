"""A store in S3 that cannot be asked: told as that, in one line, with the exit status of what it is."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from ml.core.errors import BreakhisError, CredentialsError, StoreError, TryAgain
from ml.core.s3_access import find_outage
from tests.helpers.command_line import command

__all__ = ["command"]


@pytest.fixture
def breakhis(monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]) -> Any:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-key")
    return command


@pytest.mark.integration
@pytest.mark.parametrize(
    ("port", "status", "words"),
    [("9", 75, "cannot be reached or broke off .*; try again"), ("", 3, "has no such bucket .*NoSuchBucket")],
)
def test_a_store_that_is_not_there(
    breakhis: Any, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, port: str, status: int, words: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}" if port else s3_endpoint)
    monkeypatch.setenv("BREAKHIS_STORE", "s3://no-such-bucket/store")
    code, _, err = breakhis("publish", "manifest-0123456789ab")
    assert code == status, err
    assert "Traceback" not in err
    assert re.search(f"error: the store's S3 server {words}", err)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, CredentialsError), (403, CredentialsError), (429, TryAgain), (503, TryAgain), (412, None)],
)
def test_what_the_server_refuses(status: int, kind: type[BreakhisError] | None) -> None:
    answer = {"Error": {"Code": "Some", "Message": "says why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    outage = find_outage(ClientError(answer, "PutObject"))  # type: ignore[arg-type]
    assert (None if outage is None else type(outage)) is kind


def test_no_key() -> None:
    assert "set AWS_ACCESS_KEY_ID" in str(find_outage(NoCredentialsError()))


def test_a_bucket_that_went_away() -> None:
    answer = {"Error": {"Code": "NoSuchBucket"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    assert type(find_outage(ClientError(answer, "GetObject"))) is StoreError  # type: ignore[arg-type]
