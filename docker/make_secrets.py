"""Write .env from .env.example, with a random value for each <secret>. What is set already is not changed.

Usage: make_secrets.py [EXAMPLE [FILE]]
"""

import base64
import os
import re
import secrets
import sys
from pathlib import Path


def make_missing_lines(example: str, present: str, docker_group: str) -> str:
    """Returns the lines to add to ``present`` so that it sets all that ``example`` does."""
    known = set(re.findall(r"^([A-Z0-9_]+)=", present, re.MULTILINE))
    makers = {
        # Letters and digits only, since they stand in URLs.
        "<secret>": lambda: secrets.token_hex(32),
        "<fernet>": lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "<docker group>": lambda: docker_group,
    }
    lines = []
    for line in example.splitlines():
        name, equals, value = line.partition("=")
        if name in known:
            continue
        if present and not equals:
            continue  # comments are written the first time only
        lines.append(f"{name}={makers[value]()}" if value in makers else line)
    return "".join(f"{line}\n" for line in lines)


def main(example: str = ".env.example", file: str = ".env") -> None:
    """Writes the settings that the file lacks; see the module."""
    socket = Path("/var/run/docker.sock")
    group = str(socket.stat().st_gid) if socket.exists() else "0"
    target = Path(file)
    present = target.read_text() if target.exists() else ""
    added = make_missing_lines(Path(example).read_text(), present, group)
    if present and not present.endswith("\n"):
        present += "\n"
    scratch = target.with_name(f"{target.name}.new")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as opened:
        opened.write(present + added)
    scratch.replace(target)
    names = [line.partition("=")[0] for line in added.splitlines() if "=" in line and not line.startswith("#")]
    print(f"{file}: {'wrote ' + str(len(names)) + ' settings' if names else 'has everything already'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
