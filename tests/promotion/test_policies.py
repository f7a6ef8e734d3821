import pytest

from ml.core.errors import ConfigError
from ml.core.settings import PROJECT
from ml.promotion.policies import REQUIRED_EVIDENCE, Limit, Policy, load_policy


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
