from ml.core.mlflow_pages import build_run_url, build_version_url


def test_pages_ask_for_the_side_of_model_training():
    side = "?workflowType=machine_learning"
    assert build_run_url("http://mlflow/", "7", "abc") == f"http://mlflow/#/experiments/7/runs/abc{side}"
    report = build_run_url("http://mlflow", "7", "abc", "evaluation/report.html")
    assert report == f"http://mlflow/#/experiments/7/runs/abc/artifacts/evaluation/report.html{side}"
    assert build_version_url("http://mlflow", "a b", 3) == f"http://mlflow/#/models/a%20b/versions/3{side}"
