#!/usr/bin/env bash
# One would guess that reading a cloud path gives what the bucket holds, since cloudpathlib checks its cache for age.
# It compares modification times, which S3 gives in whole seconds: an object that is overwritten in the second in which
# it was written is read from the cache, stale. A fresh client reads the new one.
# This matters where state is kept in small objects that are rewritten at once: leases, pointers, compare-and-set.
# Library: cloudpathlib 0.26.0, against moto 5.2.5 in process (S3 itself gives whole seconds, too).
set -euo pipefail

cloudpathlib="${CLOUDPATHLIB_VERSION:-0.26.0}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  "cloudpathlib[s3]==$cloudpathlib" "moto[s3]==5.2.5"

env HOME="$work" AWS_ACCESS_KEY_ID=made-up AWS_SECRET_ACCESS_KEY=made-up AWS_DEFAULT_REGION=us-east-1 \
  venv/bin/python -W ignore - <<'PY'
import sys

import boto3
import cloudpathlib
from moto import mock_aws

print("cloudpathlib", cloudpathlib.__version__)
with mock_aws():
    bucket = boto3.client("s3")
    bucket.create_bucket(Bucket="pictures")
    for attempt in range(20):  # until both writes fall into one second
        key = f"state-{attempt}"
        path = cloudpathlib.S3Client().S3Path(f"s3://pictures/{key}")
        bucket.put_object(Bucket="pictures", Key=key, Body=b"old")
        first, before = path.read_text(), bucket.head_object(Bucket="pictures", Key=key)["LastModified"]
        bucket.put_object(Bucket="pictures", Key=key, Body=b"new")
        second, after = path.read_text(), bucket.head_object(Bucket="pictures", Key=key)["LastModified"]
        if before == after:
            break
    else:
        sys.exit("Both writes never fell into one second: nothing was tried")
    other = cloudpathlib.S3Client().S3Path(f"s3://pictures/{key}").read_text()
    held = bucket.get_object(Bucket="pictures", Key=key)["Body"].read().decode()
print("An object is overwritten in the second in which it was written:")
print(f"  the bucket holds {held!r}; the path reads {first!r}, then {second!r}; another client reads {other!r}")
if (held, first, other) != ("new", "old", "new"):
    sys.exit("CHANGED: the bucket or a fresh client no longer behaves as described")
if second != "old":
    sys.exit("CHANGED: the second read is no longer stale")
PY
