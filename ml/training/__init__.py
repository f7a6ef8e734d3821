"""From a split to a run in MLflow: presets, networks, features, fitting, cross-validation, checkpoints."""
