"""Judging: a version's evidence is checked against the promotion policy and compared with the champion."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.errors import ConfigError
from ml.core.hashes import digest, object_id
from ml.core.mlflow_client import connect, fetch_artifacts
from ml.core.mlflow_pages import build_run_url, build_version_url
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.training_sets import find_training_set
from ml.evaluation.comparison_simulation import Memos
from ml.promotion.champion import Champion, read_champion
from ml.promotion.champion_comparison import compare_with_champion, make_missing_comparison
from ml.promotion.evidence import verify_evidence
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy, load_policy
from ml.promotion.questions import check_may_be_asked
from ml.promotion.review_texts import format_review_body, format_review_title
from ml.promotion.reviews import PROMOTE
from ml.registry.registered_model import CANDIDATE, CHAMPION, RegisteredModel

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def judge_version(
    model: str,
    number: str,
    store: Store,
    settings: Settings,
    *,
    evidence: str | None = None,
    policy: str | None = None,
) -> Json:
    """Check a version against its training set's promotion policy (the ``gate`` stage), or against another policy.

    Reviewers decide on one *bundle*: the evidence of the version and of the champion, the gates with their results, the
    comparison, and the policy with its hash. Its id is its hash, and an approval holds for exactly this bundle.

    Args:
        model: name of the registered model.
        number: its version.
        store: holds evidence and pictures, and takes the bundle.
        settings: say where MLflow and the policies are.
        evidence: id that the version's evidence must have; None accepts any.
        policy: name or path of another policy. Its verdict is only shown: it is not recorded and promotes nothing.

    Returns:
        ``{model, version, passed, gates, warnings, evidence, bundle, bundle_sha256, dag_runs, policy, policy_hash,
        approvals, summary, title, review}``: the verdict of :func:`ml.promotion.gates.judge_evidence`, the ids of
        evidence and bundle, DAG and run of each training, and the review's title and body.

    Raises:
        RegistryError: there is no such version, or it was not registered by ``breakhis register``.
        Refused: the version or the champion is not what its evidence says, or the version has other evidence. In a run
            of the DAG ``promote`` also where no approval could count: it was rejected or withdrawn, or it is not known
            who started its training.
        TryAgain: predictions for the comparison with the champion cannot be read.
    """
    # Reviewers are asked in a run of the DAG; by hand, the gates of any version can be looked at.
    is_asking = settings.dag == PROMOTE and policy is None
    if is_asking and evidence:
        check_may_be_asked(model, number, evidence, store, settings)
    return judge(RegisteredModel(model, settings), number, store, evidence=evidence, policy=policy)


def judge(
    model: RegisteredModel,
    number: str,
    store: Store,
    *,
    evidence: str | None = None,
    policy: str | None = None,
    records: Sequence[Json] | None = None,
    memos: Memos | None = None,
) -> Json:
    """Judge a version as :func:`judge_version` does, on what the caller has verified already.

    Args:
        model: the registered model.
        number: as of :func:`judge_version`, like ``store``, ``evidence``, ``policy``, the result and the errors.
        store: see there.
        evidence: see there.
        policy: see there.
        records: verified audit records of the model; default: those in the store, unverified.
        memos: keep the results of the comparison's simulation; default: the store's, which anybody may write.
    """
    version = model.find_version(number)
    evidence_id, candidate = verify_evidence(version, store, model.settings, evidence, recompute=True)
    champion = read_champion(model, store, records)
    if champion and champion.evidence["version"] == candidate["version"]:
        champion = None  # a version is not compared with itself
    loaded = _load_policy(model, policy)
    bundle, verdict = _make_bundle(evidence_id, candidate, champion, loaded, store, memos or store)
    bundle_id = object_id("bundle", bundle)
    result: Json = {
        "model": model.name,
        "version": int(version.version),
        "evidence": evidence_id,
        "bundle": bundle_id,
        "bundle_sha256": digest(bundle),
        "dag_runs": candidate.get("dag_runs", []),
        **verdict,
        "title": format_review_title(candidate),
        "review": format_review_body(bundle, bundle_id, _list_links(candidate, model.settings)),
    }
    if policy is None:
        _record_bundle(bundle, bundle_id, version, store, model.settings)
    return result


def _make_bundle(
    evidence_id: str,
    candidate: Json,
    champion: Champion | None,
    policy: Policy | ConfigError,
    store: Store,
    memos: Memos,
) -> tuple[Json, Json]:
    """Returns the bundle of a candidate, and the verdict that is part of it."""
    comparison = None
    if champion and champion.gone:
        comparison = make_missing_comparison(champion.evidence, champion.gone)
    elif champion and isinstance(policy, Policy):
        comparison = compare_with_champion(candidate, champion.evidence, policy.comparison, store, memos)
    verdict = judge_evidence(candidate, policy, comparison)
    bundle = {
        "evidence_id": evidence_id,
        "evidence": candidate,
        "champion": champion.evidence if champion else None,
        "comparison": comparison,
        "policy_content": policy.model_dump(mode="json") if isinstance(policy, Policy) else None,
        **verdict,
    }
    return bundle, verdict


def _record_bundle(bundle: Json, bundle_id: str, version: "ModelVersion", store: Store, settings: Settings) -> None:
    """Write a bundle to the store and to the version's run, and tag the version with it and its outcome."""
    client, model, number = connect(settings), str(version.name), str(version.version)
    versions = {CANDIDATE: bundle["evidence"], **({CHAMPION: bundle["champion"]} if bundle["champion"] else {})}
    store.create("bundle", bundle, bundle, lambda folder: _copy_evaluations(versions, folder))
    client.log_dict(version.run_id, bundle, f"gates/{model}-v{number}/{bundle_id}.json")
    client.set_model_version_tag(model, number, "breakhis.bundle", bundle_id)
    client.set_model_version_tag(model, number, "breakhis.gates", "passed" if bundle["passed"] else "blocked")


def _copy_evaluations(versions: dict[str, Json], folder: Path) -> None:
    """Copy figures, report and model card of candidate and champion to a bundle's folder, for its reviewer."""
    for name, evidence in versions.items():
        (folder / name).mkdir()
        if not evidence["artifacts"]:  # its run is gone
            continue
        with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
            for file in fetch_artifacts(f"runs:/{evidence['run_id']}/evaluation", Path(scratch)).iterdir():
                if file.suffix in {".png", ".html", ".md"}:
                    shutil.copyfile(file, folder / name / file.name)


def _load_policy(model: RegisteredModel, other: str | None) -> Policy | ConfigError:
    """Returns another policy if one is named, else the model's own; or the error where it cannot be read."""
    try:
        if other:
            return load_policy(other, model.settings.conf)
        training_set, _ = find_training_set(model.name, model.settings)
        return load_policy(training_set.policy, model.settings.conf, training_set.file.parent)
    except ConfigError as error:
        return error


def _list_links(evidence: Json, settings: Settings) -> dict[str, str]:
    """Returns text -> address of what a reviewer may want to look at."""
    links = {}
    if settings.mlflow_ui:
        ui, run = settings.mlflow_ui, evidence["run_id"]
        experiment = connect(settings).get_run(run).info.experiment_id
        links["The training run in MLflow: plots and metrics"] = build_run_url(ui, experiment, run)
        links["The model version in MLflow"] = build_version_url(ui, evidence["model"], evidence["version"])
    for source, validation in evidence["validations"].items():
        links[f"Validation of the source {source} (Data Docs)"] = f"/breakhis/docs/{validation}/index.html"
    return links
