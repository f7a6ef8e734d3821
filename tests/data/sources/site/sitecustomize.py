"""Points the unmodified Kaggle package at the stand-in server in a process of its own.

Python imports this at its start where the folder is on PYTHONPATH. The package reads its endpoint from nowhere else:
KAGGLE_API_ENVIRONMENT knows only fixed addresses, of which the local one is port 80.
"""

import os
import time

if url := os.environ.get("STANDIN_KAGGLE_URL"):
    from kagglesdk import kaggle_env

    kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = url

    time.sleep = lambda _: None  # the package waits 2, 4, … 32 seconds between its own tries
