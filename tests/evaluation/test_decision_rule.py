import json

import numpy as np

from ml.evaluation.decision_rule import DecisionRule


def test_malignant_at_or_above_the_threshold():
    assert DecisionRule(threshold=0.3).assign_labels(np.array([0.29, 0.3, 0.31])).tolist() == [0, 1, 1]


def test_without_offsets_the_highest_probability_wins():
    assert DecisionRule().assign_labels(np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]])).tolist() == [1, 0]


def test_logit_adjustment_favours_the_rare_class():
    shares = np.array([0.9, 0.1])
    p = np.array([[0.8, 0.2], [0.95, 0.05]])
    rule = DecisionRule(offsets=tuple(-np.log(shares)))  # p / share: 0.89 and 2, then 1.06 and 0.5
    assert rule.assign_labels(p).tolist() == [1, 0]


def test_a_probability_of_zero_is_accepted():
    assert DecisionRule(offsets=(0.0, 0.0)).assign_labels(np.array([[0.0, 1.0]])).tolist() == [1]


def test_a_rule_survives_json():
    for rule in (DecisionRule(threshold=0.25), DecisionRule(offsets=(0.5, -1.0)), DecisionRule()):
        assert DecisionRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
