"""Retraining of breast-histopathology classifiers: the stages that do the work. Never imports Airflow."""
