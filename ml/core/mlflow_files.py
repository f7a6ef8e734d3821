"""Where MLflow's database in the home folder says that its files lie, and the correction after the folder was moved.

MLflow keeps absolute paths: an experiment's is given to each of its runs and models. With an old path it does not fail
as one would expect. It logs into a new folder at the old place, and downloads a model as an empty folder.
"""

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ml.core.errors import ConfigError, TryAgain

ARTIFACTS = "mlartifacts"
"""The folder in the home folder that holds MLflow's files."""

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""Tables and columns of MLflow 3 that say where files lie.

MLmodel files name the place, too, as ``artifact_path``. MLflow does not go by it, and the evidence of a version has the
hashes of its files.
"""


def database_uri(home: Path) -> str:
    """Returns the address of MLflow's database in a home folder, as MLflow takes it; it need not exist."""
    return f"sqlite:///{_find_database(home)}"


DAMAGE = ("file is not a database", "database disk image is malformed", "malformed database schema")
"""What SQLite says of a file that is something else or damaged."""


def check_database(file: Path) -> None:
    """Checks that SQLite can open a file, as far as its beginning tells; MLflow itself would try again for two minutes.

    One that is missing, in use or may not be read passes: MLflow says so at once, or makes it.

    Raises:
        ConfigError: it is no file, such as a folder or a pipe, no database, or damaged.
    """
    if file.exists() and not file.is_file():
        raise ConfigError(f"{file}: MLflow's database has to be a file, and this is none; move it out of the way")
    try:
        with closing(_open_to_read(file)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        return
    except sqlite3.DatabaseError as error:
        raise ConfigError(explain_damage(str(file), str(error))) from None


def explain_damage(place: str, fault: str) -> str:
    """Returns the message about a damaged database of MLflow's; ``fault`` is what SQLite says of it."""
    return (
        f"{place}: MLflow's database is damaged ({fault}); stop what uses it, and restore the file from a backup, or "
        "save what can still be read by: sqlite3 FILE .recover"
    )


@functools.lru_cache(maxsize=8)
def check_files(home: Path) -> None:
    """Checks that MLflow's database in a home folder names that folder's files. It is asked once a process.

    Raises:
        ConfigError: it names another folder's, so the home folder was moved or copied; or it is damaged.
    """
    check_database(_find_database(home))
    for old in _find_other_folders(home):
        raise ConfigError(
            f"the home folder was moved or copied to {home}: MLflow's database in it says that its files lie in {old}. "
            f"Make it say that they lie in {home / ARTIFACTS}: breakhis relocate"
        )


def relocate_files(home: Path) -> dict[str, int]:
    """Makes MLflow's database in a home folder name that folder's files. No MLflow server may use it meanwhile.

    Returns:
        Each other folder that the database named -> number of places that were corrected; empty where all was right.

    Raises:
        TryAgain: another process writes to the database. Nothing is changed then.
        ConfigError: there is no database in that folder, or it is damaged.
    """
    check_files.cache_clear()
    if not _find_database(home).exists():
        raise ConfigError(
            f"{_find_database(home)} does not exist, so nothing was corrected; set BREAKHIS_HOME to the folder as it "
            "is named now"
        )
    check_database(_find_database(home))
    corrected: dict[str, int] = {}
    try:
        with closing(sqlite3.connect(_find_database(home))) as database, database:
            for old in _find_other_folders(home):
                corrected[str(old)] = sum(_correct_column(database, *column, old, home) for column in _COLUMNS)
    except sqlite3.OperationalError as error:
        raise TryAgain(f"{_find_database(home)} cannot be corrected: {error}; stop what uses it") from None
    return corrected


def _correct_column(database: sqlite3.Connection, table: str, column: str, old: Path, home: Path) -> int:
    """Replaces the folder ``old`` in the places of one column; returns how many had it."""
    before, after = old.as_uri(), (home / ARTIFACTS).as_uri()
    changed = database.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",  # noqa: S608 - constants
        (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
    )
    return changed.rowcount


def _find_database(home: Path) -> Path:
    return home / "mlflow.db"


def _find_other_folders(home: Path) -> list[Path]:
    """Returns the folders named ``mlartifacts`` that the database names, other than this home folder's own."""
    database, own = _find_database(home), home / ARTIFACTS
    if not database.is_file() or not own.is_dir():
        return []
    folders = {folder for place in _read_places(database) if (folder := _find_artifacts_folder(place))}
    return sorted(folder for folder in folders if folder != own and not (folder.exists() and folder.samefile(own)))


def _read_places(database: Path) -> Iterator[str]:
    try:
        with closing(_open_to_read(database)) as connection:
            yield from (row[0] for row in connection.execute("SELECT artifact_location FROM experiments") if row[0])
    except sqlite3.Error:  # not MLflow's, damaged or in use: MLflow itself says what is wrong
        return


def _open_to_read(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)


def _find_artifacts_folder(place: str) -> Path | None:
    """Returns the folder ``mlartifacts`` of a place such as ``file:///home/mlartifacts/1``; None for another place."""
    parts = urlsplit(place)
    if parts.scheme != "file":
        return None
    path = Path(unquote(parts.path))
    return next((folder for folder in (path, path.parent) if folder.name == ARTIFACTS), None)
