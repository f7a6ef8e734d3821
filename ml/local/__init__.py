"""Runs the whole product on one machine: Airflow and MLflow on SQLite, the workflow in them, and a check-up."""
