import re
from types import SimpleNamespace

import pytest
from airflow.sdk import DAG, Param
from airflow.sdk.exceptions import AirflowFailException
from hypothesis import given
from hypothesis import strategies as st

from breakhis_airflow.run_conf import EVIDENCE_PATTERN, MODEL_PATTERN, VERSION_PATTERN, refuse_unknown_conf


def run(params, conf):
    return {"dag": DAG("retrain_mine", schedule=None, params=params), "dag_run": SimpleNamespace(conf=conf)}


FORM = {"preset": Param("default", type="string"), "seed": Param(0, type="integer")}


def test_a_misspelt_key_ends_the_run_and_names_the_nearest():
    with pytest.raises(AirflowFailException) as refused:
        refuse_unknown_conf(run(FORM, {"sed": 3, "preset": "paper", "x": 1}))
    assert str(refused.value) == (
        "the conf of this run has keys that retrain_mine does not know: 'sed' (did you mean 'seed'?), 'x'; it takes: "
        "preset, seed. Start a new run without them"
    )


def test_a_dag_without_a_form_takes_nothing():
    with pytest.raises(AirflowFailException, match=r"does not know: 'seed'; it takes: none\."):
        refuse_unknown_conf(run({}, {"seed": 3}))
    for conf in (None, {}, {"origin": {"dag": "retrain_mine", "run": "manual"}}):
        refuse_unknown_conf(run({}, conf))


KEYS = st.sampled_from(["preset", "seed", "origin"]) | st.text(max_size=6)


@given(st.dictionaries(KEYS, st.none() | st.integers() | st.text(), max_size=4))
def test_a_run_goes_on_exactly_if_every_key_is_known(conf):
    unknown = set(conf) - {"preset", "seed", "origin"}
    if not unknown:
        refuse_unknown_conf(run(FORM, conf))
        return
    with pytest.raises(AirflowFailException) as refused:
        refuse_unknown_conf(run(FORM, conf))
    assert all(repr(key) in str(refused.value) for key in unknown)


@pytest.mark.parametrize("pattern", [MODEL_PATTERN, VERSION_PATTERN, EVIDENCE_PATTERN])
def test_a_param_names_its_subject_in_one_way_only(pattern):
    """JSON Schema searches, and in Python ``$`` also matches before a line break at the end."""
    valid = {MODEL_PATTERN: "demo-binary", VERSION_PATTERN: "12", EVIDENCE_PATTERN: "evidence-0123456789ab"}[pattern]
    assert re.search(pattern, valid)
    for other in (f"{valid}\n", f" {valid}", f"{valid} ", f"{valid}\n\n", f"+{valid}"):
        assert not re.search(pattern, other)
