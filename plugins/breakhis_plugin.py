"""The plugin that Airflow loads at its start: links on tasks, review pages and validation reports."""

from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

from breakhis_airflow.addresses import PREFIX
from breakhis_airflow.links import DataDocsLink, ModelVersionLink, QuarantineLink, ReportLink, ReviewLink, RunLink


class BreakhisPlugin(AirflowPlugin):
    """Registers the links and pages of this system in Airflow's UI."""

    name = "breakhis"
    operator_extra_links: ClassVar = [
        RunLink(),
        ReportLink(),
        ModelVersionLink(),
        ReviewLink(),
        DataDocsLink(),
        QuarantineLink(),
    ]
    external_views: ClassVar = [
        {"name": "Reviews", "href": "/breakhis/reviews/", "destination": "nav", "url_route": "model-reviews"}
    ]

    @property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """The pages. They are made when the API server asks: workers load plugins, too, and need no web framework."""
        from breakhis_airflow.web import create_app

        return [{"name": "breakhis", "url_prefix": PREFIX, "app": create_app()}]
