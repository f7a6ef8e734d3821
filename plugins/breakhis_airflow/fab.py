"""Users and roles of Airflow where it runs as servers: FAB keeps them in its database, with a role for each group.

The local stack has Airflow's SimpleAuthManager, which identifies users by their names. FAB numbers them; but reviewers
are named in the setting BREAKHIS_REVIEWERS, and promotions are recorded with names. A login name is unique in FAB and
only an administrator can change it, so it identifies a user here, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from airflow.providers.fab.auth_manager.fab_auth_manager import FabAuthManager
from airflow.providers.fab.www.security import permissions as fab

from ml.promotion.reviews import PROMOTE, ROLLBACK


class AuthManager(FabAuthManager):
    """FAB's auth manager, but the users who may answer a question are identified by login names instead of numbers."""

    def is_authorized_hitl_task(self, *, assigned_users: set[str], user: Any) -> bool:
        """Returns whether ``user`` is one of those that a task asks."""
        return user.get_name() in assigned_users


class User(NamedTuple):
    """A user of Airflow."""

    role: str
    password: str


ADMIN, ENGINEER, REVIEWER, VIEWER = "Admin", "User", "Reviewer", "Viewer"
"""FAB's own roles, and that of reviewers, who answer reviews and may start a rollback."""

# The permissions that FAB's own roles lack to see plugins' pages and the list of waiting reviews in the menu.
_MENU_PERMISSIONS = ((fab.ACTION_CAN_READ, fab.RESOURCE_PLUGIN), (fab.ACTION_CAN_ACCESS_MENU, fab.RESOURCE_HITL_DETAIL))
_ANSWER_PERMISSIONS = (
    (fab.ACTION_CAN_EDIT, fab.RESOURCE_HITL_DETAIL),
    # Airflow lets only users answer who may edit the DAG. All else that this allows them is to pause it.
    *((fab.ACTION_CAN_EDIT, fab.resource_name(dag, fab.RESOURCE_DAG)) for dag in (PROMOTE, ROLLBACK)),
    (fab.ACTION_CAN_CREATE, fab.resource_name(ROLLBACK, fab.RESOURCE_DAG_RUN)),
)


def set_up_users(users: Mapping[str, User]) -> None:
    """Brings Airflow's roles up to date, and gives these users their roles and passwords. Others stay as they are."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        manager = builder.sm
        manager.sync_roles()
        manager.bulk_sync_roles(
            [
                {"role": ENGINEER, "perms": _MENU_PERMISSIONS},
                {"role": VIEWER, "perms": _MENU_PERMISSIONS},
                {"role": REVIEWER, "perms": [*manager.VIEWER_PERMISSIONS, *_MENU_PERMISSIONS, *_ANSWER_PERMISSIONS]},
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
