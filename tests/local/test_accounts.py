"""The local stack's users and passwords."""

import stat

import pytest

from ml.core.errors import StackError
from ml.core.settings import Settings
from ml.local.stack import Stack


def test_passwords_are_random_private_and_kept(settings: Settings) -> None:
    settings.home.mkdir()
    first = Stack(settings).passwords()
    assert set(first) == {"admin", "engineer", "reviewer", "viewer", "breakhis-service"}
    assert len(set(first.values())) == 5
    assert all(len(password) >= 16 for password in first.values())
    assert stat.S_IMODE((settings.home / "passwords.json").stat().st_mode) == 0o600
    more = Stack(settings.model_copy(update={"reviewers": ("dr_who",)})).passwords()
    assert {name: more[name] for name in first} == first
    assert more["dr_who"] not in first.values()


def test_damaged_passwords_are_said_to_be(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "passwords.json").write_text("?")
    with pytest.raises(StackError, match=r"passwords\.json is damaged"):
        Stack(settings).passwords()


def test_every_reviewer_is_a_user(settings: Settings) -> None:
    users = Stack(settings.model_copy(update={"reviewers": ("dr_who", "viewer")})).users()
    assert (users["dr_who"], users["viewer"], users["reviewer"]) == ("user", "viewer", "user")
