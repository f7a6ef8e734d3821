"""Access to S3 for the store: one client for each pair of keys, and the requests that cloudpathlib does not make."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it and boto3 takes a tenth of a second, which would delay DAG files
    from cloudpathlib import S3Client, S3Path


@cache
def make_s3_client(endpoint: str | None, key: str | None, secret: str | None, token: str | None) -> "S3Client":
    """Returns the process's one client for these credentials.

    Creating a client takes a good part of a second, and a store is constructed for each image.
    """
    from cloudpathlib import S3Client

    return S3Client(endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=token)


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
