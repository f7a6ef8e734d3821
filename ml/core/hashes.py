"""Hashes of values and files: ids by content, and the checksums by which a changed file of the store is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml.core.stored_json import describe_damage

CHECKSUMS = "checksums"
"""The key of object.json: file name -> the SHA-256 of its content; two of them while an erasure replaces the file."""


def canonical(payload: object) -> bytes:
    """Returns the canonical JSON of a value, which hashes are computed from: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(payload: object) -> str:
    """Returns the SHA-256 (64 hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical(payload)).hexdigest()


def object_id(kind: str, payload: object) -> str:
    """Returns ``<kind>-<12 hex digits of the content's hash>``."""
    return f"{kind}-{digest(payload)[:12]}"


def hash_file(path: Path) -> str:
    """Returns the SHA-256 (64 hex digits) of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file in and below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def check_file(path: Path, name: str, content: Mapping[str, Any], uri: str) -> None:
    """Checks a local file against its object's object.json. Earlier releases recorded no checksums; those pass.

    Raises:
        StoreError: it is not what was written; names ``uri``.
    """
    known = content.get(CHECKSUMS)
    if known is None:
        return
    if not isinstance(known, dict) or name not in known:
        raise describe_damage(uri, "its object.json does not name it")
    if hash_file(path) not in known[name]:
        raise describe_damage(uri, "its content is not what was written (SHA-256)")
