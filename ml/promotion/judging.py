"""Judging: a version's evidence is held against the promotion policy and compared with the champion."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml.core.errors import ConfigError
from ml.core.mlflow_client import connect, fetch_artifacts
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest, object_id
from ml.data.training_sets import find_training_set
from ml.evaluation.comparison_simulation import Memos
from ml.promotion.champion import read_champion_evidence
from ml.promotion.champion_comparison import compare_with_champion
from ml.promotion.evidence import read_verified_object, verify_evidence
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy, load_policy
from ml.promotion.reviews import format_review_body, format_review_title
from ml.registry.registered_model import CANDIDATE, CHAMPION, RegisteredModel


def judge_version(
    model: str,
    number: str,
    store: Store,
    settings: Settings,
    *,
    evidence: str | None = None,
    policy: str | None = None,
    records: Sequence[Json] | None = None,
    memos: Memos | None = None,
) -> Json:
    """Hold a version against its training set's promotion policy (the ``gate`` stage), or against another file.

    What is decided on is one *bundle*: the version's evidence, the champion's, the gates with what each found, the
    comparison and the policy with its hash. Its id is its hash, and an approval holds for exactly that. Another
    policy's verdict is only shown; it is not recorded and promotes nothing. ``records`` are the model's in the audit
    log, by who has checked them; ``memos`` keep the simulation's results, by default as anybody may write them.

    Returns:
        ``{model, version, passed, gates, warnings, evidence, bundle, bundle_sha256, dag_runs, policy, policy_hash,
        approvals, summary, title, review}``.

    Raises:
        RegistryError: no such version, or it was never registered by us.
        Refused: the version or the champion is not what its evidence says, or ``evidence`` is another one.
    """
    client = connect(settings)
    version = RegisteredModel(model, settings).find_version(number)
    recorded = verify_evidence(version, store, settings, evidence, anew=True)
    facts = read_verified_object(recorded, store)
    champion = read_champion_evidence(model, store, settings, records)
    if champion and champion["version"] == facts["version"]:
        champion = None  # a version is not compared with itself
    found = _policy(model, settings, policy)
    comparison = None
    if champion and isinstance(found, Policy):
        comparison = compare_with_champion(facts, champion, found.comparison, store, memos or store)
    verdict = judge_evidence(facts, found, comparison)
    bundle = {
        "evidence_id": recorded,
        "evidence": facts,
        "champion": champion,
        "comparison": comparison,
        "policy_content": found.model_dump(mode="json") if isinstance(found, Policy) else None,
        **verdict,
    }
    oid = object_id("bundle", bundle)
    result: Json = {
        "model": model,
        "version": int(version.version),
        "evidence": recorded,
        "bundle": oid,
        "bundle_sha256": digest(bundle),
        "dag_runs": facts.get("dag_runs", []),
        **verdict,
        "title": format_review_title(facts),
        "review": format_review_body(bundle, oid, _links(facts, settings)),
    }
    if policy is None:
        shown = {CANDIDATE: facts, **({CHAMPION: champion} if champion else {})}
        store.create("bundle", bundle, bundle, lambda folder: _copy_evaluations(shown, folder))
        client.log_dict(version.run_id, bundle, f"gates/{model}-v{version.version}/{oid}.json")
        client.set_model_version_tag(model, str(version.version), "breakhis.bundle", oid)
        client.set_model_version_tag(model, str(version.version), "breakhis.gates", _outcome(verdict))
    return result


def _copy_evaluations(shown: dict[str, Json], folder: Path) -> None:
    """Put beside a bundle what its reviewer looks at: of candidate and champion, pictures, report and model card."""
    for name, evidence in shown.items():
        (folder / name).mkdir()
        with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
            for file in fetch_artifacts(f"runs:/{evidence['run_id']}/evaluation", Path(scratch)).iterdir():
                if file.suffix in {".png", ".html", ".md"}:
                    shutil.copyfile(file, folder / name / file.name)


def _policy(model: str, settings: Settings, other: str | None) -> Policy | ConfigError:
    try:
        if other:
            return load_policy(other, settings.conf)
        training_set, _ = find_training_set(model, settings)
        return load_policy(training_set.policy, settings.conf, training_set.file.parent)
    except ConfigError as error:
        return error


def _links(evidence: Json, settings: Settings) -> dict[str, str]:
    links = {}
    if settings.mlflow_ui:
        ui = settings.mlflow_ui.rstrip("/")
        links["The training run in MLflow: plots and metrics"] = f"{ui}/#/runs/{evidence['run_id']}"
        links["The model version in MLflow"] = f"{ui}/#/models/{evidence['model']}/versions/{evidence['version']}"
    for source, validation in evidence["validations"].items():
        links[f"Validation of the source {source} (Data Docs)"] = f"/breakhis/docs/{validation}/index.html"
    return links


def _outcome(verdict: Json) -> str:
    return "passed" if verdict["passed"] else "blocked"
