"""Certificates and proxies that do not fit: named, with what to do, and not told as something that may pass."""

from pathlib import Path

import pytest
import requests
from botocore.exceptions import ConnectTimeoutError, ProxyConnectionError, SSLError

from ml.core.errors import ConfigError, TryAgain
from ml.core.s3_access import find_outage
from ml.core.tls_and_proxies import explain_connection

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE")
TLS = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"


@pytest.mark.parametrize("variable", BUNDLES)
@pytest.mark.parametrize("content", ["missing", "folder", "garbage"])
def test_a_variable_that_names_no_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, content: str
) -> None:
    for name in BUNDLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    monkeypatch.setenv(variable, str(tmp_path / content))
    told = explain_connection(requests.exceptions.SSLError(TLS), "https://me:planted2@example.org/a?key=planted2")
    assert isinstance(told, ConfigError)
    assert f"https://…@example.org/a?…: {variable} names '{tmp_path / content}'" in str(told)
    assert "planted2" not in str(told)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (TLS, "the server has no certificate that is known here .*AWS_CA_BUNDLE"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "the server does not speak TLS there .* port"),
    ],
)
def test_tls_that_does_not_come_about(monkeypatch: pytest.MonkeyPatch, reason: str, words: str) -> None:
    for name in BUNDLES:
        monkeypatch.delenv(name, raising=False)
    told = find_outage(SSLError(endpoint_url="https://me:planted2@s3.example.org/bucket", error=reason))
    assert isinstance(told, ConfigError)
    with pytest.raises(ConfigError, match=rf"https://…@s3\.example\.org/bucket: {words}"):
        raise told
    assert "planted2" not in str(told)


def test_a_socks_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:planted2@127.0.0.1:9")
    told = find_outage(ProxyConnectionError(proxy_url="http://socks5://me:planted2@127.0.0.1:9"))
    assert isinstance(told, ConfigError)
    assert "HTTPS_PROXY names a SOCKS proxy" in str(told)
    assert "planted2" not in str(told)


@pytest.mark.parametrize("address", ["nonsense://x", "ftp://x", "http://x:99999/", "http://", "http://:80", " ", "//"])
def test_a_proxy_whose_address_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(OSError) as error:  # noqa: PT011 - of which kind is requests' own affair
        requests.get("http://127.0.0.1:9/", timeout=5)
    told = explain_connection(error.value, "http://127.0.0.1:9/")
    assert isinstance(told, ConfigError)
    assert "HTTP_PROXY and http_proxy cannot be the address of a proxy" in str(told)


def test_what_may_pass_by_itself() -> None:
    assert explain_connection(requests.exceptions.ConnectionError("refused"), "https://example.org") is None
    assert isinstance(find_outage(ConnectTimeoutError(endpoint_url="https://example.org")), TryAgain)
