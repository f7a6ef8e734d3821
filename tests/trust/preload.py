"""Imports what every deciding process needs, once: each of these processes is a fork."""

import mlflow
import pandas  # noqa: F401

import ml.promotion.decisions
import tests.trust.concurrency  # noqa: F401

assert mlflow.pyfunc
assert ml.promotion.decisions
