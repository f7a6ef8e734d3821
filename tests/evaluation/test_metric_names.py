from ml.evaluation.metric_names import group_metrics


def test_metrics_are_named_by_groups_with_the_ends_of_their_intervals():
    scores = {"recall": 0.5, "precision": 1.0, "f1": 0.6, "support": 4.0, "intervals": {"recall": [0.1, 0.9]}}
    evaluation = {
        "metrics": {"recall": 0.5, "patient_recall": 1.0},
        "intervals": {"patient_recall": [0.2, 1.0]},
        "per_class": {"malignant": scores, "benign": {**scores, "support": 0.0}},
        "slices": {"magnification": {"40": {"metrics": {"recall": 0.25}, "intervals": {"recall": [0.0, 0.5]}}}},
    }
    assert group_metrics("test", evaluation) == {
        "test/recall": 0.5,
        "test/patients/recall": 1.0,
        "test/patients/recall_low": 0.2,
        "test/patients/recall_high": 1.0,
        "test/by_class/malignant/recall": 0.5,
        "test/by_class/malignant/recall_low": 0.1,
        "test/by_class/malignant/recall_high": 0.9,
        "test/by_class/malignant/precision": 1.0,
        "test/by_class/malignant/f1": 0.6,
        "test/by_magnification/40/recall": 0.25,
        "test/by_magnification/40/recall_low": 0.0,
        "test/by_magnification/40/recall_high": 0.5,
    }
