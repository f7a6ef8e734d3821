"""Airflow's users where it runs as servers: kept in its database by FAB, with a role for each group of people.

The local stack has Airflow's SimpleAuthManager, which knows its users by their names. FAB numbers them; but a review is
asked of names (the setting BREAKHIS_REVIEWERS), and promotions are recorded with names. A login name is unique in FAB
and nobody but an administrator changes it, so that is what counts here, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from airflow.providers.fab.auth_manager.fab_auth_manager import FabAuthManager
from airflow.providers.fab.www.security import permissions as fab

from ml.promotion.reviews import PROMOTE, ROLLBACK


class AuthManager(FabAuthManager):
    """FAB's, but who may answer a question is a matter of login names and not of numbers."""

    def is_authorized_hitl_task(self, *, assigned_users: set[str], user: Any) -> bool:
        """Whether ``user`` is one of those a task asks."""
        return user.get_name() in assigned_users


class User(NamedTuple):
    """Somebody who logs in."""

    role: str
    password: str


ADMIN, ENGINEER, REVIEWER, VIEWER = "Admin", "User", "Reviewer", "Viewer"
"""Roles: FAB's own, and that of whoever answers reviews, and may ask for a champion to be taken back."""

# FAB's own roles have neither in their menu: the pages of plugins, which are left out for whoever may not list plugins,
# and the list of waiting reviews.
_MENU = ((fab.ACTION_CAN_READ, fab.RESOURCE_PLUGIN), (fab.ACTION_CAN_ACCESS_MENU, fab.RESOURCE_HITL_DETAIL))
_ANSWER = (
    (fab.ACTION_CAN_EDIT, fab.RESOURCE_HITL_DETAIL),
    # Without a right to edit the DAG itself, Airflow lets nobody answer in it. It also lets them pause it, no more.
    *((fab.ACTION_CAN_EDIT, fab.resource_name(dag, fab.RESOURCE_DAG)) for dag in (PROMOTE, ROLLBACK)),
    (fab.ACTION_CAN_CREATE, fab.resource_name(ROLLBACK, fab.RESOURCE_DAG_RUN)),
)


def set_up(users: Mapping[str, User]) -> None:
    """Bring Airflow's roles up to date, and give these users these roles and passwords. Others stay as they are."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        manager = builder.sm
        manager.sync_roles()
        manager.bulk_sync_roles(
            [
                {"role": ENGINEER, "perms": _MENU},
                {"role": VIEWER, "perms": _MENU},
                {"role": REVIEWER, "perms": [*manager.VIEWER_PERMISSIONS, *_MENU, *_ANSWER]},
            ]
        )
        for name, (role, password) in users.items():
            roles = [manager.find_role(role)]
            user = manager.find_user(username=name)
            if user is None:
                manager.add_user(name, name, "", f"{name}@localhost", roles, password)
                continue
            user.roles = roles
            manager.update_user(user)
            manager.reset_password(user.id, password)
