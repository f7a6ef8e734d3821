"""Model versions in MLflow: finding them, their aliases, the logged model, and scoring with a version."""
