#!/bin/sh
# On the database's first start: MLflow's databases beside Airflow's, with a user of its own.
set -eu
psql -v ON_ERROR_STOP=1 -v password="$MLFLOW_DB_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE USER mlflow PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_users OWNER mlflow;
SQL
