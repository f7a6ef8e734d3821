"""An archive at a web address, downloaded with requests and known by its SHA-256."""

import hashlib
from pathlib import Path

import requests

from ml.errors import BreakhisError, CredentialsError, SourceError, TryAgain
from ml.progress import say
from ml.sources.files import save
from ml.sources.spec import HttpSource

_CHUNK = 1 << 16
_SILENCE_SECONDS = 60.0


def download(spec: HttpSource, target: Path) -> None:
    """Download the archive to ``target``, going on where an earlier try broke off.

    Raises:
        SourceError: there is nothing at that address, or another archive than the YAML says.
        CredentialsError: the server wants a login.
        TryAgain: the server cannot be reached, is busy or broke off; what came is kept for the next try.
    """
    part = target.with_suffix(".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        headers = (
            {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
        )
        with requests.get(spec.url, headers=headers, stream=True, timeout=_SILENCE_SECONDS) as response:
            # 416: all of it is there, or more than there is; its hash will tell.
            if response.status_code != requests.codes.requested_range_not_satisfiable:
                if not response.ok:
                    raise _refusal(response, spec)
                resumed = response.status_code == requests.codes.partial_content
                size = int(response.headers.get("Content-Length") or 0)
                say(f"{spec.name}: downloading {spec.url}, {size / 1e6:,.0f} MB{' more' if resumed else ''}")
                with part.open("ab" if resumed else "wb") as file:
                    save(response.iter_content(_CHUNK), file, size)
    except requests.RequestException as error:
        raise TryAgain(f"{spec.url} cannot be reached or broke off ({error}); try again") from None
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.sha256:
        size = part.stat().st_size
        part.unlink()
        raise SourceError(
            f"{spec.file}: what lies at {spec.url} has the SHA-256 {found} ({size:,} bytes), not the {spec.sha256} of "
            "'sha256'. It was removed. Take the new one over only if its publisher names it"
        )
    part.replace(target)


def _refusal(response: requests.Response, spec: HttpSource) -> BreakhisError:
    status = response.status_code
    if status in (401, 403):
        return CredentialsError(f"{spec.file}: {spec.url} answers {status}: it is not for everybody to read")
    if status in (404, 410):
        return SourceError(f"{spec.file}: there is nothing at {spec.url} ({status})")
    if status == 429 or status >= 500:
        wait = response.headers.get("Retry-After")
        return TryAgain(f"{spec.url} answers {status}; try again {f'in {wait} s' if wait else 'later'}")
    return SourceError(f"{spec.file}: {spec.url} answers {status}")
