"""Addresses of Airflow's own pages, and of those that this plugin serves."""

from urllib.parse import quote, urljoin, urlsplit

from ml.promotion.reviews import parse_bundle_id

PREFIX = "/breakhis"
"""Where this plugin's pages lie below Airflow's address."""


def page(path: str) -> str:
    """The address of a page that this plugin serves; see :mod:`breakhis_airflow.web`."""
    return root(f"{PREFIX.lstrip('/')}/{quote(path)}")


def page_of(body: str | None) -> str:
    """The address of the review page that belongs to the body of a review, or nothing."""
    bundle = parse_bundle_id(body)
    return page(f"reviews/{bundle}/") if bundle else ""


def form_of(dag: str, run: str, task: str) -> str:
    """The address of Airflow's answer form of a review."""
    return root(f"dags/{quote(dag)}/runs/{quote(run)}/tasks/{quote(task)}/required_actions")


def on_this_site(address: str) -> str:
    """The same without the host: somebody may have come to Airflow by another name than the configured one."""
    return urlsplit(address).path


def root(path: str) -> str:
    """The address of one of Airflow's own pages."""
    from airflow.sdk.configuration import conf

    return urljoin(conf.get("api", "base_url", fallback="/").rstrip("/") + "/", path)
