"""What an S3 server refuses, and answers that are not those of an S3 server: each is an error of its own."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import requests
from s3_proxy import Proxy

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import fetch_source
from ml.data.sources.spec import S3_KEY_VARIABLES

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bucket": "no-such-bucket"}, SourceError, r"mine\.yaml: http.* has no s3://no-such-bucket/ \(NoSuchBucket\)"),
        ({"archive": "no.zip"}, SourceError, r"has no s3://.*/no\.zip"),
        ({"prefix": "elsewhere/"}, SourceError, "no image files below"),
        ({"endpoint": "http://127.0.0.1:9"}, TryAgain, "cannot be reached"),
    ],
)
def test_what_is_not_there(
    s3_source: Any, store: Store, settings: Settings, fields: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fetch_source(s3_source(**fields), store, settings)


def refusal(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>says why</Message></Error>".encode()


@pytest.mark.parametrize("fields", [{"prefix": "images/"}, {"archive": "all.zip"}])
@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", CredentialsError, "does not let this key read s3://"),
        (400, "ExpiredToken", CredentialsError, "does not let this key read s3://"),
        (400, "AuthorizationHeaderMalformed", SourceError, "'us-east-1' .*; correct 'region'"),
        (301, "PermanentRedirect", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        (405, "MethodNotAllowed", SourceError, "answers .* for s3://"),
        (429, "TooManyRequests", TryAgain, "try again later"),
        (500, "InternalError", TryAgain, "try again later"),
        (503, "SlowDown", TryAgain, "try again later"),
    ],
)
def test_what_the_server_refuses_is_told_apart(
    s3_source: Any,
    proxy: Proxy,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fields: Any,
    status: int,
    code: str,
    error: type[BreakhisError],
    message: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # boto3 tries again a few times, waiting longer and longer
    proxy.answer = (status, refusal(code))
    if status == 400 and "archive" in fields:  # the answer to a HEAD has no body that could tell them apart
        error, message = SourceError, "answers 400 for s3://"
    with pytest.raises(error, match=rf"mine\.yaml: http.*{message}") as caught:
        fetch_source(s3_source(endpoint=proxy.url, **fields), store, settings)
    assert type(caught.value) is error
    assert store.keys("objects") == []


@pytest.mark.parametrize(
    ("fields", "data", "error", "message"),
    [
        ({"prefix": "images/"}, b"<a/>", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        ({"archive": "all.zip"}, b"<a/>", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        ({"archive": "all.zip"}, b"{}", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        # boto3 takes it for a fault of an S3 server.
        ({"prefix": "images/"}, b"<html><p>Hello<br>", TryAgain, "see whether 'endpoint' is an S3 server"),
    ],
)
def test_a_web_server_of_another_kind_is_told_from_s3(
    s3_source: Any,
    proxy: Proxy,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fields: Any,
    data: bytes,
    error: type[BreakhisError],
    message: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    proxy.answer = (200, data)
    with pytest.raises(error, match=message):
        fetch_source(s3_source(endpoint=proxy.url, **fields), store, settings)


@pytest.fixture
def guarded(s3_endpoint: str) -> Iterator[Callable[[str], tuple[str, str]]]:
    """The server checks keys from now on. Call it with an action for the key and secret of a user who may do that."""
    iam = boto3.client(
        "iam", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )

    def user(action: str) -> tuple[str, str]:
        iam.create_user(UserName="fetcher")
        statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName="fetcher", PolicyName="may", PolicyDocument=policy)
        key = iam.create_access_key(UserName="fetcher")["AccessKey"]
        requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
        return key["AccessKeyId"], key["SecretAccessKey"]

    yield user
    requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"inf", timeout=10)
    for key in iam.list_access_keys(UserName="fetcher")["AccessKeyMetadata"]:
        iam.delete_access_key(UserName="fetcher", AccessKeyId=key["AccessKeyId"])
    iam.delete_user_policy(UserName="fetcher", PolicyName="may")
    iam.delete_user(UserName="fetcher")


def test_a_server_that_checks_keys(
    s3_source: Any, guarded: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = guarded("s3:*")

    def use(*pair: str) -> None:
        for name, value in zip(S3_KEY_VARIABLES, pair, strict=True):
            monkeypatch.setenv(name, value)

    for pair, code in (((key, "wrong-secret"), "SignatureDoesNotMatch"), (("AKIAUNKNOWN", secret), "InvalidAccessKey")):
        use(*pair)
        with pytest.raises(CredentialsError, match=rf"does not let this key read s3://.* \({code}") as error:
            fetch_source(s3_source(prefix="images/"), store, settings)
        assert pair[1] not in str(error.value)
    use(key, secret)
    assert fetch_source(s3_source(prefix="images/"), store, settings)["files"] == 2


def test_a_key_that_may_list_and_not_read(
    s3_source: Any, guarded: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(S3_KEY_VARIABLES, guarded("s3:ListBucket"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(CredentialsError, match=r"does not let this key read s3://.*/images/.* \(AccessDenied"):
        fetch_source(s3_source(prefix="images/"), store, settings)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({S3_KEY_VARIABLES[0]: "half"}, "BREAKHIS_SOURCE_KEY is set and BREAKHIS_SOURCE_SECRET is not"),
        ({"AWS_PROFILE": "nobody"}, r".*\(nobody\).*AWS_PROFILE"),
        ({"AWS_SESSION_TOKEN": "hunter\n2"}, "AWS_SESSION_TOKEN has a blank"),
        ({S3_KEY_VARIABLES[0]: "a key\n", S3_KEY_VARIABLES[1]: "secret"}, "BREAKHIS_SOURCE_KEY has a blank"),
        ({S3_KEY_VARIABLES[0]: "key", S3_KEY_VARIABLES[1]: "se cret"}, "BREAKHIS_SOURCE_SECRET has a blank"),
    ],
)
def test_credentials_that_cannot_be_right(
    s3_source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, variables: Any, message: str
) -> None:
    for name in S3_KEY_VARIABLES:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, CredentialsError), match=rf"mine\.yaml: s3://[^ ]*: {message}"):
        fetch_source(s3_source(), store, settings)


def test_no_key(s3_source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in S3_KEY_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the key that an earlier test may have had
    with pytest.raises(CredentialsError, match=r"s3://.*: there is no key for S3 .* set BREAKHIS_SOURCE_KEY and"):
        fetch_source(s3_source(), store, settings)


def test_a_prefix_and_an_archive_are_one_too_many(s3_source: Any) -> None:
    with pytest.raises(ConfigError, match="'prefix' and 'archive' are both given"):
        s3_source(prefix="images/", archive="all.zip")
