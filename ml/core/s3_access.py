"""Access to S3 for the store: one client for each pair of keys, and the requests that cloudpathlib does not make."""

from functools import cache
from typing import TYPE_CHECKING, Any

from ml.core.errors import BreakhisError, CredentialsError, StoreError, TryAgain
from ml.core.messages import cut_text

if TYPE_CHECKING:  # importing it and boto3 takes a tenth of a second, which would delay DAG files
    from cloudpathlib import S3Client, S3Path


@cache
def make_s3_client(endpoint: str | None, key: str | None, secret: str | None, token: str | None) -> "S3Client":
    """Returns the process's one client for these credentials.

    Creating a client takes a good part of a second, and a store is constructed for each image.
    """
    from cloudpathlib import S3Client

    return S3Client(endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=token)


_ADVICE = "check BREAKHIS_STORE, AWS_ENDPOINT_URL and the AWS credentials"


def find_outage(error: Exception) -> BreakhisError | None:
    """Returns our error where the store's S3 server could not be asked, or has answered that there is no such store.

    Args:
        error: what boto3 raised.

    Returns:
        TryAgain where the server is down or busy, CredentialsError where it refuses the key or none was given,
        StoreError where there is no such bucket; None for all else.
    """
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return CredentialsError(f"the store has no key ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    # What breaks off while the content comes is left by boto3 as urllib3 raised it.
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError | HTTPError):
        return TryAgain(f"the store's S3 server cannot be reached or broke off ({cut_text(error)}); try again")
    return _translate_refusal(error) if isinstance(error, exceptions.ClientError) else None


def _translate_refusal(error: Any) -> BreakhisError | None:
    status, text = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), cut_text(error)
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


def find_boto_client(path: "S3Path") -> Any:
    """Returns the boto3 client behind a path, for what cloudpathlib does not offer."""
    return path.client.client
