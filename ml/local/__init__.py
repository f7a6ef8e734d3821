"""The whole product on one machine: Airflow and MLflow on SQLite, the workflow run through them, and a check-up."""
