"""Addresses of pages in MLflow's UI.

MLflow 3.17 shows its GenAI side to a browser that has not chosen, with other menus and without the registry;
``workflowType`` asks for the side of model training. A run's page is named with its experiment: ``#/runs/<run>`` leads
there, too, but drops ``workflowType`` on the way, and below it there is no page for an artifact.
"""

from urllib.parse import quote

_SIDE = "?workflowType=machine_learning"


def build_run_url(ui: str, experiment: str, run: str, artifact: str = "") -> str:
    """Returns the page of a run, or of one of its artifacts.

    Args:
        ui: MLflow's address.
        experiment: id of the run's experiment.
        run: id of the run.
        artifact: path of the artifact among those of the run.
    """
    page = f"experiments/{_quote(experiment)}/runs/{_quote(run)}"
    return _build_url(ui, f"{page}/artifacts/{quote(artifact)}" if artifact else page)


def build_version_url(ui: str, model: str, version: str | int) -> str:
    """Returns the page of a model version in the registry."""
    return _build_url(ui, f"models/{_quote(model)}/versions/{_quote(str(version))}")


def _build_url(ui: str, page: str) -> str:
    return f"{ui.rstrip('/')}/#/{page}{_SIDE}"


def _quote(name: str) -> str:
    return quote(name, safe="")
