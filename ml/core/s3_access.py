"""Access to S3 for the store: one client for each pair of keys, and the requests that cloudpathlib does not make."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ml.core.errors import BreakhisError, ConfigError, Conflict, CredentialsError, StoreError, TryAgain
from ml.core.messages import cut_text, hide_access, list_items, quote_value
from ml.core.tls_and_proxies import explain_connection

if TYPE_CHECKING:  # importing it and boto3 takes a tenth of a second, which would delay DAG files
    from cloudpathlib import S3Client, S3Path

STORE_KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@cache
def make_s3_client(endpoint: str | None, key: str | None, secret: str | None, token: str | None) -> "S3Client":
    """Returns the process's one client for these credentials.

    Creating a client takes a good part of a second, and a store is constructed for each image.

    Raises:
        ConfigError: a variable for S3, or a file that one names, is invalid.
        CredentialsError: half of a key is missing, or is none.
    """
    from cloudpathlib import S3Client

    require_whole_key(dict(zip(STORE_KEY_VARIABLES, (key, secret), strict=True)) | {"AWS_SESSION_TOKEN": token})
    with explained_setup({"AWS_ENDPOINT_URL": endpoint}, has_key=bool(key)):
        return S3Client(
            endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=token
        )


def require_whole_key(variables: Mapping[str, str | None]) -> None:
    """Checks a key, as far as that is possible without asking: what the library says of an odd one would show it.

    Args:
        variables: the values by the names of the variables, first the key, then its secret.

    Raises:
        CredentialsError: one of them cannot be what a server gave out; names the variable and does not show its value.
    """
    for name, value in variables.items():
        if not re.fullmatch(r"[!-~]*", value or ""):
            raise CredentialsError(
                f"{name} has a blank, a line break or an odd character in it; copy the key again, without them"
            )
    first, second = list(variables)[:2]
    if bool(variables[first]) != bool(variables[second]):
        given, missing = (first, second) if variables[first] else (second, first)
        raise CredentialsError(f"{given} is set and {missing} is not; set both or neither")


@contextmanager
def explained_setup(endpoints: Mapping[str, str | None] | None = None, *, has_key: bool = False) -> Iterator[None]:
    """Context manager in which a client is made. It asks no S3 server, so whatever fails is a setting.

    Args:
        endpoints: the server's address, by the name of its variable; default: what the library reads itself.
        has_key: the key is given, so that the library looks for none.

    Raises:
        ConfigError: a setting is invalid; names it.
    """
    given = endpoints or {"AWS_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL")}
    others = {"AWS_ENDPOINT_URL_S3": os.environ.get("AWS_ENDPOINT_URL_S3") or None}
    for name, value in (others if set(given.values()) <= {None} else given).items():
        if value is not None:
            _check_endpoint(name, value)
    for name in _COUNTS & os.environ.keys():
        if not re.fullmatch(r"[1-9][0-9]{0,5}", os.environ[name]):
            raise ConfigError(f"{name} must be a whole number from 1, not {quote_value(os.environ[name])}; correct it")
    token_file = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
    if token_file and not has_key and not Path(token_file).is_file():
        raise ConfigError(f"AWS_WEB_IDENTITY_TOKEN_FILE names {quote_value(token_file)}, which is no file; correct it")
    try:
        yield
    except BreakhisError:
        raise
    except Exception as error:
        names = sorted(name for name in os.environ if name.startswith("AWS_") and name not in _SECRETS)
        raise explain_configuration(error) or ConfigError(
            f"S3 cannot be used as it is set up ({cut_text(_show(error), 100)}); see what is set by "
            f"{list_items(names, limit=40) or 'AWS_…'} and in ~/.aws"
        ) from None


def _check_endpoint(name: str, value: str) -> None:
    try:
        parts = urlsplit(value)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or not re.fullmatch(r"[^\s?#]+", value):
        # What is not an address cannot be searched for a password.
        shown = "what it is set to" if "@" in value else quote_value(hide_access(value))
        raise ConfigError(
            f"{name} is no address of an S3 server: {shown}; write it as http://localhost:9000, or unset it for AWS"
        )


_COUNTS = frozenset({"AWS_MAX_ATTEMPTS", "AWS_METADATA_SERVICE_TIMEOUT", "AWS_METADATA_SERVICE_NUM_ATTEMPTS"})
_SECRETS = frozenset({*STORE_KEY_VARIABLES, "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"})
_FILES = "the file of AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE (default: those in ~/.aws)"
_SETTINGS = {
    "BaseEndpointResolverError": "AWS_DEFAULT_REGION",
    "ConfigNotFound": _FILES,
    "ConfigParseError": _FILES,
    "EndpointProviderError": "AWS_ENDPOINT_URL or AWS_DEFAULT_REGION",
    "InvalidChecksumConfigError": "AWS_REQUEST_CHECKSUM_CALCULATION or AWS_RESPONSE_CHECKSUM_VALIDATION",
    "InvalidConfigError": f"an AWS_… variable or {_FILES}",
    "InvalidDefaultsMode": "AWS_DEFAULTS_MODE",
    "InvalidEndpointConfigurationError": "AWS_ENDPOINT_URL",
    "InvalidIMDSEndpointError": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "InvalidIMDSEndpointModeError": "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",
    "InvalidMaxRetryAttemptsError": "AWS_MAX_ATTEMPTS",
    "InvalidProxiesConfigError": _FILES,
    "InvalidRegionError": "AWS_DEFAULT_REGION",
    "InvalidRetryConfigurationError": "AWS_MAX_ATTEMPTS or AWS_RETRY_MODE",
    "InvalidRetryModeError": "AWS_RETRY_MODE",
    "InvalidS3AddressingStyleError": f"addressing_style in {_FILES}",
    "InvalidS3UsEast1RegionalEndpointConfigError": "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT",
    "InvalidSTSRegionalEndpointsConfigError": "AWS_STS_REGIONAL_ENDPOINTS",
    "MissingDependencyException": _FILES,
    "ParamValidationError": "the bucket's name in BREAKHIS_STORE, or AWS_ROLE_ARN",
    "ProfileNotFound": "AWS_PROFILE",
    "UnknownRegionError": "AWS_DEFAULT_REGION",
    "UnknownSignatureVersionError": _FILES,
    "UnsupportedS3ConfigurationError": _FILES,
}
"""An error of botocore's about a setting, or the class that it is derived from -> the setting."""


def explain_configuration(
    error: BaseException, key: str = " and ".join(STORE_KEY_VARIABLES)
) -> ConfigError | CredentialsError | None:
    """Returns our error where boto3 cannot be used as it is set up, which stays so until somebody acts.

    Args:
        error: what boto3 raised.
        key: where a key is taken from.

    Returns:
        ConfigError with the name of the setting, CredentialsError where no key was found; None for all else. Neither
        shows a key, or what an address grants access by.
    """
    from botocore import exceptions

    if isinstance(error, _find_key_errors()):
        return CredentialsError(f"there is no key for S3 ({_show(error)}); set {key}")
    kwargs = getattr(error, "kwargs", {})
    address = kwargs.get("endpoint_url") or kwargs.get("proxy_url") or "the S3 server"
    if isinstance(error, exceptions.BotoCoreError | OSError) and (unfit := explain_connection(error, address)):
        return unfit
    cause = kwargs.get("error") if isinstance(error, exceptions.HTTPClientError) else None
    if isinstance(cause, ValueError):
        if "header" in str(cause).lower():  # its text is the header, with the key
            return CredentialsError(f"the key for S3 cannot be sent; copy it again, into {key}")
        return ConfigError(f"no request can be made for S3 ({_show(cause)}); correct HTTPS_PROXY or HTTP_PROXY")
    setting = next((_SETTINGS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _SETTINGS), None)
    if setting and isinstance(error, exceptions.BotoCoreError):
        return ConfigError(f"S3 cannot be used as it is set up ({_show(error)}); correct {setting}")
    return None


@cache
def _find_key_errors() -> tuple[type[Exception], ...]:
    from botocore import exceptions

    return (
        exceptions.CredentialRetrievalError,
        exceptions.LoginError,
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.RefreshWithMFAUnsupportedError,
        exceptions.SSOError,
        exceptions.UnknownCredentialError,
    )


def _show(error: object) -> str:
    """Returns an error's text for a message; it quotes addresses."""
    return cut_text(hide_access(error))


_ADVICE = "check BREAKHIS_STORE, AWS_ENDPOINT_URL and the AWS credentials"


def find_outage(error: Exception) -> BreakhisError | None:
    """Returns our error where the store's S3 server could not be asked, or has answered that there is no such store.

    Args:
        error: what boto3 raised.

    Returns:
        TryAgain where the server is down or busy, CredentialsError where it refuses the key or none was given,
        ConfigError where boto3 is set up wrongly, StoreError where there is no such bucket; None for all else.
    """
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    if explained := explain_configuration(error):
        return explained
    # What breaks off while the content comes is left by boto3 as urllib3 raised it.
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError | HTTPError):
        return TryAgain(f"the store's S3 server cannot be reached or broke off ({_show(error)}); try again")
    return _translate_refusal(error) if isinstance(error, exceptions.ClientError) else None


def _translate_refusal(error: Any) -> BreakhisError | None:
    status, text = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), _show(error)
    if error.response.get("Error", {}).get("Code") == "NoSuchBucket":
        return StoreError(f"the store's S3 server has no such bucket ({text}); {_ADVICE}")
    if status in {401, 403}:
        return CredentialsError(f"the store's S3 server refuses this key ({text}); {_ADVICE}")
    if status == 429 or status >= 500:
        return TryAgain(f"the store's S3 server is busy or has a fault ({text}); try again later")
    return None


def read_object(path: "S3Path") -> bytes:
    """Returns the bytes of an object. cloudpathlib would keep a copy of it on disk.

    Raises:
        FileNotFoundError: there is no such object.
    """
    s3 = find_boto_client(path)
    try:
        data: bytes = s3.get_object(Bucket=path.bucket, Key=path.key)["Body"].read()
    except s3.exceptions.NoSuchKey:
        raise FileNotFoundError(str(path)) from None
    return data


def upload_file(path: "S3Path", source: Path) -> None:
    """Uploads a local file. A copy that cloudpathlib keeps of an earlier one, of the same second, would pass for it."""
    path.upload_from(source, force_overwrite_to_cloud=True)
    path.clear_cache()  # type: ignore[no-untyped-call]


def upload_folder(path: "S3Path", source: Path, last: str) -> None:
    """Uploads the files in and below a local folder, that of the name ``last`` after all others."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file == source / last):
        upload_file(path / file.relative_to(source).as_posix(), file)


def read_tagged_object(path: "S3Path") -> tuple[bytes | None, str | None]:
    """Returns an object's bytes and its version tag for :func:`write_object_if`; ``(None, None)`` if there is none."""
    s3 = find_boto_client(path)
    try:
        answer = s3.get_object(Bucket=path.bucket, Key=path.key)
    except s3.exceptions.NoSuchKey:
        return None, None
    return answer["Body"].read(), answer["ETag"]


def write_object_if(path: "S3Path", data: bytes, expected: str | None) -> None:
    """Writes an object if it still has the version tag ``expected`` (None: it must not exist yet).

    Raises:
        Conflict: another writer changed it in between.
        TryAgain: S3 did not accept the write.
    """
    s3 = find_boto_client(path)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    try:
        s3.put_object(Bucket=path.bucket, Key=path.key, Body=data, **condition)
    except s3.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}:
            raise Conflict(f"{path} was changed by another writer; try again") from None
        raise find_outage(error) or TryAgain(f"{path}: {cut_text(hide_access(error))}") from error


def measure_object_age(path: "S3Path") -> float | None:
    """Returns the seconds since an object was written, by the server's clock; None if there is none."""
    s3 = find_boto_client(path)
    try:
        answer = s3.get_object(Bucket=path.bucket, Key=path.key)
    except s3.exceptions.NoSuchKey:
        return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


def find_boto_client(path: "S3Path") -> Any:
    """Returns the boto3 client behind a path, for what cloudpathlib does not offer."""
    return path.client.client
