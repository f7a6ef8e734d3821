"""A store in S3 that cannot be asked: told as that, in one line, with the exit status of what it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from ml.core.errors import BreakhisError, CredentialsError, StoreError, TryAgain
from ml.core.s3_access import find_outage, make_s3_client
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


NO_KEY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(
            ({"AWS_ENDPOINT_URL": address}, "AWS_ENDPOINT_URL")
            for address in (
                *("", " ", "localhost:9000", "ftp://x", "http://", "http://a b", "http://a..b", "http://[::1"),
                *(
                    "http://localhost:99999",
                    "http://me:planted2@x:99999",
                    "http://me:planted 2@x",
                    "http://x/?k=planted2",
                ),
            )
        ),
        ({"AWS_ENDPOINT_URL": None, "AWS_ENDPOINT_URL_S3": "localhost:9000"}, "AWS_ENDPOINT_URL_S3"),
        *(({"AWS_MAX_ATTEMPTS": value}, "AWS_MAX_ATTEMPTS must be") for value in ("", "0", "-1", "1.5", "lots")),
        ({"AWS_METADATA_SERVICE_TIMEOUT": "x"}, "AWS_METADATA_SERVICE_TIMEOUT must be"),
        ({**NO_KEY, "AWS_CONTAINER_CREDENTIALS_FULL_URI": "nonsense"}, "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
        ({**NO_KEY, "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere"}, "AWS_WEB_IDENTITY_TOKEN_FILE names '/nowhere'"),
        ({**NO_KEY, "AWS_CONFIG_FILE": "program"}, "AWS_CONFIG_FILE"),
        ({**NO_KEY, "AWS_CONFIG_FILE": "role"}, "AWS_CONFIG_FILE"),
        ({"AWS_CONFIG_FILE": "broken"}, "AWS_CONFIG_FILE"),
        ({"AWS_CONFIG_FILE": "binary"}, "AWS_CONFIG_FILE"),
        ({"AWS_CONFIG_FILE": "style"}, "addressing_style in the file of AWS_CONFIG_FILE"),
        ({**NO_KEY, "AWS_SHARED_CREDENTIALS_FILE": "broken"}, "AWS_SHARED_CREDENTIALS_FILE"),
        ({"AWS_PROFILE": "nobody"}, "correct AWS_PROFILE"),
        ({"AWS_DEFAULT_REGION": "eu west 1"}, "correct AWS_DEFAULT_REGION"),
        ({"AWS_RETRY_MODE": "x"}, "correct AWS_RETRY_MODE"),
        ({"AWS_DEFAULTS_MODE": "x"}, "correct AWS_DEFAULTS_MODE"),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "x"}, "correct AWS_REQUEST_CHECKSUM_CALCULATION"),
        ({"AWS_STS_REGIONAL_ENDPOINTS": "x"}, "correct AWS_STS_REGIONAL_ENDPOINTS"),
        ({"AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "x"}, "correct AWS_S3_US_EAST_1_REGIONAL_ENDPOINT"),
        (NO_KEY, "there is no key for S3 .*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": None}, "AWS_SECRET_ACCESS_KEY is set and AWS_ACCESS_KEY_ID is not"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not"),
        *(
            ({name: value}, f"{name} has a blank, a line break or an odd character")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            for value in ("planted2\nplanted2", "planted2\r", "planted2 ", "planted2\u00df", "planted2\udcff")
        ),
        ({"NO_PROXY": "", "HTTP_PROXY": "http://me:planted2@127.0.0.1:99999"}, "HTTP_PROXY"),
    ],
)
def test_a_setting_of_s3_that_is_wrong_is_named_and_no_secret_shown(
    breakhis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], words: str
) -> None:
    texts = {
        "program": "[default]\ncredential_process=/nowhere/program planted2\n",
        "role": "[default]\nrole_arn=arn:aws:iam::1:role/x\nsource_profile=none\n",
        "style": "[default]\ns3=\n  addressing_style=up\n",
        "broken": "[default\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted2")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("BREAKHIS_STORE", "s3://bucket/store")
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, str(tmp_path / value) if value in {*texts, "binary"} else value)
    make_s3_client.cache_clear()
    code, _, err = breakhis("publish", "manifest-0123456789ab")
    make_s3_client.cache_clear()
    assert code == 3, err
    assert re.search(words, err)
    assert "Traceback" not in err
    assert "hunter" not in err
    assert len(err) < 400


def test_an_address_is_told_without_its_password(breakhis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:planted2@127.0.0.1:9")
    monkeypatch.setenv("BREAKHIS_STORE", "s3://bucket/store")
    code, _, err = breakhis("publish", "manifest-0123456789ab")
    assert code == 75
    assert "http://…@127.0.0.1:9" in err
    assert "planted2" not in err
