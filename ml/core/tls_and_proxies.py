"""Connections that never come about until somebody acts: files of certificates and proxies that are set up wrongly."""

import os
import re
import ssl
from pathlib import Path

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from ml.core.errors import ConfigError
from ml.core.messages import cut_text, hide_access, quote_value

_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_TLS = re.compile(r"SSL|TLS|certificate", re.IGNORECASE)


def explain_connection(error: BaseException, address: str) -> ConfigError | None:
    """Returns our error where no further try can help: the certificates, the protocol or the proxy do not fit.

    Args:
        error: what requests, urllib3 or boto3 raised, or the OSError about a file of certificates.
        address: where the connection was to lead.

    Returns:
        ConfigError, which names the variable or the address and says what to do; None for all else.
    """
    place, text = cut_text(hide_access(address)), str(error)
    if "SOCKS" in text or re.search(r"proxy.*//socks", text):
        names = [name for name in _PROXIES if os.environ.get(name, "").lower().startswith("socks")]
        return ConfigError(
            f"{place}: {' and '.join(names) or 'the proxy'} names a SOCKS proxy, which is not supported; name one that "
            "speaks HTTP, or unset it and name the address in NO_PROXY"
        )
    if isinstance(error, ValueError) and (names := [name for name in _PROXIES if _is_odd(os.environ.get(name, ""))]):
        return ConfigError(
            f"{place}: {' and '.join(names)} cannot be the address of a proxy ({cut_text(hide_access(text))}); write "
            "http://HOST:PORT, or unset it"
        )
    is_about_tls = _TLS.search(text) or isinstance(error, FileNotFoundError)
    return _explain_tls(text, place) if is_about_tls else None


def _explain_tls(text: str, place: str) -> ConfigError | None:
    """Returns our error about certificates or the protocol; None for an interruption."""
    reason = cut_text(hide_access(text))
    if re.search(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|UNKNOWN_PROTOCOL|HTTP_REQUEST", text):
        return ConfigError(
            f"{place}: the server does not speak TLS there ({reason}); correct the address, such as its port, or write "
            "http:// if it is meant to be open"
        )
    for name in _BUNDLES:
        if os.environ.get(name) and not _holds_certificates(Path(os.environ[name])):
            return ConfigError(
                f"{place}: {name} names {quote_value(os.environ[name])}, where there are no certificates in PEM; "
                "correct it, or unset it"
            )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return ConfigError(
            f"{place}: the server has no certificate that is known here ({reason}); correct the address, or name your "
            "own authority's file in REQUESTS_CA_BUNDLE (for S3: AWS_CA_BUNDLE)"
        )
    return None


def _is_odd(proxy: str) -> bool:
    """Says whether a proxy's address is one that requests and urllib3 do not take."""
    try:
        url = parse_url(proxy if "//" in proxy else f"//{proxy}")
    except LocationParseError:
        return True
    return bool(proxy) and (url.scheme not in {None, "http", "https"} or not url.host)


def _holds_certificates(path: Path) -> bool:
    """Says whether a file holds certificates, or a folder some under the names that OpenSSL looks for."""
    try:
        if path.is_dir():
            return any(re.fullmatch(r"[0-9a-f]{8}\.[0-9]+", file.name) for file in path.iterdir())
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except OSError:  # ssl.SSLError is one
        return False
    return True
