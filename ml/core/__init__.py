"""The base of every other package: store, settings, errors, progress, clients of Airflow and MLflow, taxonomy."""
