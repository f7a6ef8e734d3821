"""Addresses of pages in Airflow's UI, for stages, which do not have Airflow itself."""

from urllib.parse import quote

REVIEWS_PATH = "/breakhis/reviews/"
"""Path of the page with all reviews, which this package's plugin serves, below Airflow's address."""


def build_dag_run_url(ui: str, dag: str, run: str) -> str:
    """Returns the page of a run of a DAG; ``ui`` is Airflow's address."""
    return f"{ui.rstrip('/')}/dags/{quote(dag, safe='')}/runs/{quote(run, safe='')}"


def build_reviews_url(ui: str) -> str:
    """Returns the page with all reviews."""
    return f"{ui.rstrip('/')}{REVIEWS_PATH}"
