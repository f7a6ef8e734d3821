"""What every other package stands on: store, settings, errors, progress, clients of Airflow and MLflow, taxonomy."""
