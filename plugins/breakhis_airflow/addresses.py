"""Builds addresses of Airflow's own pages, and of those that this plugin serves."""

from urllib.parse import quote, urljoin, urlsplit

from ml.promotion.reviews import parse_bundle_id

PREFIX = "/breakhis"
"""Where this plugin's pages lie below Airflow's address."""


def build_page_url(path: str) -> str:
    """Returns the address of a page that this plugin serves; see :mod:`breakhis_airflow.web`."""
    return build_airflow_url(f"{PREFIX.lstrip('/')}/{quote(path)}")


def build_review_page_url(body: str | None) -> str:
    """Returns the address of the review page of the evidence bundle that a review's body names; else an empty text."""
    bundle = parse_bundle_id(body)
    return build_page_url(f"reviews/{bundle}/") if bundle else ""


def build_answer_form_url(dag: str, run: str, task: str) -> str:
    """Returns the address of Airflow's answer form of a review."""
    return build_airflow_url(f"dags/{quote(dag)}/runs/{quote(run)}/tasks/{quote(task)}/required_actions")


def strip_host(address: str) -> str:
    """Returns an address without its host, since Airflow may be reached by another name than the configured one."""
    return urlsplit(address).path


def build_airflow_url(path: str) -> str:
    """Returns the address of a page below Airflow's configured address."""
    from airflow.sdk.configuration import conf

    return urljoin(conf.get("api", "base_url", fallback="/").rstrip("/") + "/", path)
