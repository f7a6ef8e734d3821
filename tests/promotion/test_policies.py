from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ml.core.errors import ConfigError
from ml.core.settings import PROJECT
from ml.evaluation.metric_names import LOWER_IS_BETTER, METRIC_NAMES
from ml.promotion.policies import REQUIRED_EVIDENCE, BinaryMetric, Limit, Policy, SubtypeMetric, load_policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 'key: value' lines"),
        ("# nothing\n", "expected 'key: value' lines"),
        ("- a\n", "found list"),
        ("name: p\nbinary: {magic: 0.5}\n", "magic"),
        ("name: p\nfloor: 1\n", "unknown key 'floor'"),
        ("name: p\nbinary: {roc_auc: .nan}\n", "finite number"),
        ("name: p\nbinary: {roc_auc: {}}\n", "say one of at_least and at_most"),
        ("name: p\nbinary: {roc_auc: {at_least: 0.5, at_most: 0.9}}\n", "say one of at_least and at_most"),
        ("name: p\nbinary: {roc_auc: {at_most: 0.9}}\n", "say roc_auc: {at_least: 0.9}"),
        ("name: p\nbinary: {ece: 0.1}\n", "say ece: {at_most: 0.1}"),
        ("name: p\nslices: {binary: {zoom: {roc_auc: 0.5}}}\n", "unknown key 'slices.binary.zoom'"),
        ("name: p\nslices: {subtype: {subtype: {accuracy: 0.5}}}\n", "unknown key"),
        ("name: p\nskip: true\n", "unknown key 'skip'"),
        ("name: p\nrequire: [luck]\n", "luck"),
        ("name: p\ncomparison: {margin: 0}\n", "comparison.margin"),
        ("name: p\napprovals: 0\n", "approvals"),
        ("name: strict\nbinary: {roc_auc: 0.1}\n", "'name' is 'strict'; call it 'p' or rename the file"),
        ("binary: {roc_auc: 0.1}\n", "'name' is missing"),
    ],
)
def test_files_that_are_no_policy(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.yaml") as refused:
        load_policy(str(tmp_path / "p.yaml"), tmp_path)
    assert message in str(refused.value) or "Input should be" in str(refused.value)


def test_a_bare_number_is_the_least():
    policy = Policy(name="p", binary={"roc_auc": 0.9, "macro_f1": {"at_least": 0.5, "of": "interval"}})
    assert policy.limits("binary") == {
        "roc_auc": Limit(at_least=0.9),
        "macro_f1": Limit(at_least=0.5, of="interval"),
    }
    assert policy.limits("subtype") == {}


def test_what_a_policy_does_not_say_is_strict():
    policy = Policy(name="p")
    assert (policy.zero_recall, policy.absent_classes, policy.require) == ("block", "block", REQUIRED_EVIDENCE)
    assert (policy.comparison.margin, policy.approvals) == (0.05, 1)


def test_shipped_policies():
    conf = PROJECT / "dags"
    default, demo = load_policy("default", conf), load_policy("demo", conf)
    assert {name: one.bound for name, one in default.limits("binary").items()} == {"roc_auc": 0.853, "macro_f1": 0.737}
    assert {name: one.bound for name, one in default.limits("subtype").items()} == {
        "macro_f1": 0.327,
        "roc_auc_ovr": 0.75,
    }
    assert set(default.slice_limits("binary")) == {"magnification"}
    assert default.require == REQUIRED_EVIDENCE
    assert {name: one.bound for name, one in demo.limits("binary").items()} == {"roc_auc": 0.75, "macro_f1": 0.35}
    assert "pretrained_weights" not in demo.require
    for file in (conf / "policies").glob("*.yaml"):
        assert load_policy(file.stem, conf).name == file.stem


def refused(folder, text):
    (folder / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_policy(str(folder / "p.yaml"), folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder / 'p.yaml'}: ")


METRICS = st.sampled_from(
    [("binary", metric) for metric in get_args(BinaryMetric)] + [("subtype", m) for m in get_args(SubtypeMetric)]
)


@given(METRICS, st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-3, 3), st.booleans())
def test_a_limit_that_is_none_is_refused_with_its_gate(tmp_path_factory, metric, bound, of_interval):
    """Every model keeps it, or none can."""
    folder = tmp_path_factory.getbasetemp()
    (task, name), lower = metric, metric[1] in LOWER_IS_BETTER
    side, of = ("at_most" if lower else "at_least"), ("interval" if of_interval else "value")
    text = f"name: p\n{task}:\n  {name}: {{{side}: {bound:f}, of: {of}}}\n"
    written = float(f"{bound:f}")
    worst = 2 if task == "subtype" and name.endswith("brier") else 1
    if 0 < written < worst or (written == 1 and not lower):
        (folder / "p.yaml").write_text(text)
        assert load_policy(str(folder / "p.yaml"), folder).limits(task)[name].bound == written
        return
    said = refused(folder, text)
    assert said.startswith(f"line 3: '{task}.{name}': ")
    assert f"{side}: {written:g}" in said
    assert METRIC_NAMES[name] in said


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "0", "-1", "2", "yes", "1e", "'high'", "017", "[]"])
@pytest.mark.parametrize("written", ["{}", "{{at_least: {}}}", "{{at_most: {}}}"])
def test_a_number_that_no_metric_can_be(tmp_path, number, written):
    said = refused(
        tmp_path, f"name: p\nslices:\n  binary:\n    magnification:\n      roc_auc: {written.format(number)}\n"
    )
    assert said.startswith("line 5: 'slices.binary.magnification.roc_auc")


@given(METRICS, st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=9))
def test_an_unknown_key_within_a_limit_is_refused_with_its_gate(tmp_path_factory, metric, key):
    assume(key not in {"at_least", "at_most", "of", "null"})
    (task, name), folder = metric, tmp_path_factory.getbasetemp()
    side = "at_most" if name in LOWER_IS_BETTER else "at_least"
    said = refused(folder, f"name: p\n{task}:\n  {name}:\n    {side}: 0.5\n    {key}: 0.9\n")
    assert said == f"line 5: unknown key '{task}.{name}.{key}' (known: at_least, at_most, of)"


@given(st.lists(st.sampled_from(["roc_auc", "macro_f1", "recall", "f1"]), min_size=2, max_size=5), st.data())
def test_a_second_line_switches_no_gate_off(tmp_path_factory, metrics, data):
    folder = tmp_path_factory.getbasetemp()
    bounds = [data.draw(st.sampled_from([0.001, 0.5, 0.9])) for _ in metrics]
    lines = [f"  {metric}: {bound}" for metric, bound in zip(metrics, bounds, strict=True)]
    text = "\n".join(["name: p", "binary:", *lines, ""])
    if len(set(metrics)) < len(metrics):
        assert "stands there twice, first in line" in refused(folder, text)
        return
    (folder / "p.yaml").write_text(text)
    limits = load_policy(str(folder / "p.yaml"), folder).limits("binary")
    assert {metric: limit.bound for metric, limit in limits.items()} == dict(zip(metrics, bounds, strict=True))


@pytest.mark.parametrize(
    "rule", ["margin: 0", "margin: 1", "margin: .nan", "margin: -0.1", "least_power: 1.1", "least_power: .nan"]
)
def test_a_rule_of_non_inferiority_outside_its_range(tmp_path, rule):
    said = refused(tmp_path, f"name: p\ncomparison:\n  {rule}\n")
    assert said.startswith(f"line 3: 'comparison.{rule.partition(':')[0]}': ")


def test_a_limit_with_an_exponent_is_told_how_to_write_a_number(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("name: small\nbinary: {roc_auc: 1e-9}\n")
    with pytest.raises(ConfigError, match="if it is a number, write it in plain decimals"):
        load_policy(str(file), tmp_path)
    file.write_text("name: small\nbinary: {roc_auc: 0.000000001}\n")
    assert load_policy(str(file), tmp_path).binary["roc_auc"].bound == 1e-9
