"""Retrains breast-histopathology classifiers: every stage of the workflow. This package never imports Airflow."""
