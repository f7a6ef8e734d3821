"""What Airflow loads at start: links on tasks, and the pages that serve validation reports."""

from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

from breakhis_airflow.links import DataDocsLink, ModelVersionLink, QuarantineLink, RunLink


class BreakhisPlugin(AirflowPlugin):
    """The links and pages of this system, for Airflow's UI."""

    name = "breakhis"
    operator_extra_links: ClassVar = [RunLink(), ModelVersionLink(), DataDocsLink(), QuarantineLink()]

    @property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """The pages, made when the API server asks: workers load plugins too, and need no web framework."""
        from breakhis_airflow.web import PREFIX, create_app

        return [{"name": "breakhis", "url_prefix": PREFIX, "app": create_app()}]
