"""Objects as releases before checksums wrote them."""

import json

from ml.core.hashes import CHECKSUMS
from ml.core.store import Store


def drop_checksums(store: Store, oid: str) -> None:
    """Write an object's object.json again without its checksums."""
    path = store.path(f"{store.object_key(oid)}/object.json")
    content = json.loads(path.read_text())
    del content[CHECKSUMS]
    path.write_text(json.dumps(content))
