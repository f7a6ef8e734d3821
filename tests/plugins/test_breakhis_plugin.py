"""The plugin as Airflow loads it, in a process of its own: loading happens once."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
from airflow import plugins_manager
plugins, errors = plugins_manager._get_plugins()
names = [p.name for p in plugins if p.source and "breakhis" in str(p.source)]
light = not {"breakhis_airflow.web", "tensorflow", "mlflow", "great_expectations"} & set(sys.modules)
bare = {"operators", "links", "web", "review_operator", "yaml_dags", "environment", "notifications"}
stray = sorted(bare & set(sys.modules))
links = [link.name for link in plugins_manager.get_operator_extra_links()]
apps = [app["url_prefix"] for app in plugins_manager.get_fastapi_plugins()[0]]
print("RESULT", json.dumps([names, errors, light, stray, links, apps]))
"""


def test_airflow_loads_one_plugin_and_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    names, errors, light, stray, links, apps = json.loads(line.removeprefix("RESULT"))
    assert names == ["breakhis"]
    assert errors == {}
    assert light
    assert stray == []  # .airflowignore: else each module is run a second time under its bare name
    assert {"MLflow run", "MLflow model version", "Data Docs", "Quarantine"} <= set(links)
    assert "/breakhis" in apps
