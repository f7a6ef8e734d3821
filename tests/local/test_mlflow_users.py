"""MLflow's users against a real server: what each may do there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowException
from mlflow.tracking import MlflowClient

from ml.core.errors import CredentialsError, TryAgain
from ml.core.settings import Settings
from ml.data.training_sets import registered_model_names
from ml.local.mlflow_users import (
    ADMIN,
    GRANTS,
    PROMOTER,
    TRAINER,
    auth_config_text,
    set_up_mlflow_users,
)
from ml.promotion.judging import judge_version
from ml.registry.registered_model import Aliases, RegisteredModel
from tests.helpers.registry_world import RegistryWorld
from tests.trust.servers import mlflow_server

PASSWORDS = {name: f"password-of-{name}" for name in (ADMIN, TRAINER, PROMOTER, "engineer", "viewer")}

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryWorld]:
    """A registry behind a MLflow with users, set up twice as two starts of a stack do."""
    folder = tmp_path_factory.mktemp("identities")
    config = folder / "users.ini"
    config.write_text(auth_config_text(f"sqlite:///{folder / 'users.db'}"))
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS[ADMIN],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret",
    }
    with mlflow_server(folder, "--app-name", "basic-auth", environment=environment) as url:
        names = ("made-binary", "made-subtype")
        set_up_mlflow_users(url, PASSWORDS | {"viewer": "what it was before"}, names)
        set_up_mlflow_users(url, PASSWORDS, names)
        with as_user(TRAINER):
            yield RegistryWorld.create(folder, url)


class as_user:  # noqa: N801
    """Within the block, MLflow's client is this user."""

    def __init__(self, name: str) -> None:
        self.own = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": PASSWORDS.get(name, "none")}

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.own}
        os.environ.update(self.own)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@pytest.fixture(scope="module")
def logged(world: RegistryWorld) -> str:
    """A run with a model, by the trainer."""
    return world.log_run(0.9)


@pytest.fixture(scope="module")
def candidate(world: RegistryWorld, logged: str) -> dict[str, Any]:
    """A version of it, by the promoter."""
    with as_user(PROMOTER):
        return world.register(logged)


def test_the_trainer_logs_and_takes_away_what_a_killed_training_left(world: RegistryWorld, logged: str) -> None:
    run = world.client.get_run(logged)
    assert run.data.metrics["test_roc_auc"] == 0.9
    [model] = world.client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{logged}'")
    left = world.client.create_logged_model(run.info.experiment_id, "model", source_run_id=logged)
    world.client.delete_logged_model(left.model_id)
    assert model.model_id != left.model_id


def test_the_promoter_registers_and_sets_aliases(world: RegistryWorld, candidate: dict[str, Any]) -> None:
    with as_user(PROMOTER):
        assert world.client.get_model_version_by_alias("made-binary", "candidate").version == str(candidate["version"])
        world.client.set_registered_model_alias("made-binary", "champion", "1")
        world.client.delete_registered_model_alias("made-binary", "champion")
        world.client.log_dict(logged_by(world), {"passed": True}, "gates/bundle.json")


def test_the_promoter_does_all_that_stages_which_decide_ask_of_mlflow(world: RegistryWorld) -> None:
    run = world.log_run(0.95)
    with as_user(PROMOTER):
        made = world.register(run)
        number = str(made["version"])
        judged = judge_version(made["model"], number, world.store, world.settings, evidence=made["evidence"])
        assert world.client.get_model_version(made["model"], number).tags["breakhis.bundle"] == judged["bundle"]
        registered = RegisteredModel(made["model"], world.settings)
        before = registered.aliases()
        wanted = Aliases(champion=made["version"], previous=1)
        registered.move_aliases(wanted, decided=made["version"])
        assert registered.aliases() == (made["version"], 1, None)
        anchor = registered.audit_anchor()
        registered.set_audit_anchor("99:abc")
        assert registered.audit_anchor() == "99:abc"
        world.client.set_registered_model_tag(made["model"], "breakhis.audit", anchor)
        registered.move_aliases(before)
        world.client.set_registered_model_alias(made["model"], "candidate", "1")


def logged_by(world: RegistryWorld) -> str:
    return str(world.client.get_model_version("made-binary", "1").run_id)


FORBIDDEN: dict[str, Callable[[MlflowClient, str], object]] = {
    "make a version": lambda client, run: client.create_model_version("made-binary", f"runs:/{run}/model", run),
    "set an alias": lambda client, run: client.set_registered_model_alias("made-binary", "champion", "1"),
    "delete an alias": lambda client, run: client.delete_registered_model_alias("made-binary", "candidate"),
    "tag a version": lambda client, run: client.set_model_version_tag("made-binary", "1", "breakhis.gates", "passed"),
    "tag a model": lambda client, run: client.set_registered_model_tag("made-binary", "breakhis.audit", "1:x"),
    "delete a version": lambda client, run: client.delete_model_version("made-binary", "1"),
    "rename a model": lambda client, run: client.rename_registered_model("made-binary", "other"),
    "delete a model": lambda client, run: client.delete_registered_model("made-binary"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("user", [TRAINER, "engineer", "viewer"])
def test_nobody_else_touches_the_registry(
    world: RegistryWorld, candidate: dict[str, Any], logged: str, user: str, what: str
) -> None:
    with as_user(user), pytest.raises(MlflowException, match="Permission denied"):
        FORBIDDEN[what](world.client, logged)
    with as_user(PROMOTER):
        model = world.client.get_registered_model("made-binary")
        assert {alias: int(version) for alias, version in model.aliases.items()} == {"candidate": candidate["version"]}


def test_the_trainer_makes_no_registered_model_of_its_own(world: RegistryWorld, logged: str) -> None:
    url = f"{world.settings.mlflow_uri}/api/2.0/mlflow/registered-models/create"
    for tags in ([], [{"key": "mlflow.prompt.is_prompt", "value": "true"}]):  # a model once it has lost its tag
        body = {"name": "another-binary", "tags": tags}
        assert requests.post(url, json=body, auth=(TRAINER, PASSWORDS[TRAINER]), timeout=30).status_code == 403
    with pytest.raises(MlflowException, match="Permission denied"):
        mlflow.register_model(f"runs:/{logged}/model", "another-binary")


def test_the_names_of_all_training_sets_belong_to_the_promoter(world: RegistryWorld) -> None:
    assert registered_model_names(world.settings) == ["made-binary", "made-subtype"]
    with as_user("engineer"), pytest.raises(MlflowException, match="RESOURCE_ALREADY_EXISTS"):
        world.client.create_registered_model("made-subtype")


def test_a_model_that_somebody_made_before_its_set_was_declared_is_taken_over_loudly(
    world: RegistryWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its maker owns it in MLflow, and could move its aliases for ever."""
    with as_user("engineer"):
        world.client.create_registered_model("later-binary")
        world.client.set_registered_model_tag("later-binary", "whose", "mine")
    names = ("made-binary", "made-subtype", "later-binary")
    set_up_mlflow_users(world.settings.mlflow_uri, PASSWORDS, names)
    assert "later-binary was engineer's (right MANAGE) in MLflow; it has been taken over" in capsys.readouterr().err
    with as_user("engineer"), pytest.raises(MlflowException, match="Permission denied"):
        world.client.set_registered_model_tag("later-binary", "whose", "mine")
    set_up_mlflow_users(world.settings.mlflow_uri, PASSWORDS, names)
    assert "taken over" not in capsys.readouterr().err


def test_people_read_and_write_nothing(world: RegistryWorld, candidate: dict[str, Any], logged: str) -> None:
    for user in ("engineer", "viewer"):
        with as_user(user):
            assert world.client.get_run(logged).info.status == "FINISHED"
            assert world.client.get_model_version_by_alias("made-binary", "candidate").run_id == logged
            with pytest.raises(MlflowException, match="Permission denied"):
                world.client.log_metric(logged, "test_roc_auc", 1.0)
            with pytest.raises(MlflowException, match="Permission denied"):
                world.client.set_tag(logged, "breakhis.set", "real")


def test_without_a_password_nothing_is_shown(world: RegistryWorld) -> None:
    url = f"{world.settings.mlflow_uri}/api/2.0/mlflow/registered-models/search"
    assert requests.get(url, timeout=30).status_code == 401
    assert requests.get(url, auth=("viewer", "what it was before"), timeout=30).status_code == 401
    assert requests.get(f"{world.settings.mlflow_uri}/health", timeout=30).status_code == 200


def test_a_wrong_password_of_the_administrator_is_told(world: RegistryWorld) -> None:
    with pytest.raises(CredentialsError, match="refuses the password of its user 'admin'"):
        set_up_mlflow_users(world.settings.mlflow_uri, PASSWORDS | {ADMIN: "another"}, [])


def test_a_server_that_is_not_there_may_come(tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="does not answer"):
        set_up_mlflow_users("http://127.0.0.1:9", PASSWORDS, [])


def test_a_training_set_that_cannot_be_read_reserves_nothing(tmp_path: Path) -> None:
    for name, text in {"good": "ledger: good\npolicy: demo\npreset: demo\nsources: [demo]\n", "bad": "?"}.items():
        file = tmp_path / "conf" / "training_sets" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name: {name}\n{text}")
    assert registered_model_names(Settings(conf=tmp_path / "conf")) == ["good-binary", "good-subtype"]


def test_both_service_accounts_are_in_the_rules() -> None:
    assert set(GRANTS) == {TRAINER, PROMOTER}
