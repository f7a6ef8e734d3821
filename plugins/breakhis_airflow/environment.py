"""Selects the part of the Airflow worker's environment that a stage gets.

A worker's environment holds Airflow's own secrets: the database's address, the Fernet and JWT keys, connections. No
stage needs them, so a stage gets what is named here and nothing else.
"""

from collections.abc import Mapping

_MACHINE_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH"),
        *("MPLCONFIGDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    }
)
"""Variables that hold for one machine or one image only."""

_NAMES = _MACHINE_NAMES | {
    *("LANG", "LANGUAGE", "TZ", "PYTHONHASHSEED", "PYTHONWARNINGS", "NO_COLOR", "DO_NOT_TRACK"),
    # proxies
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
}
_INCLUDED_PREFIXES = (
    *("BREAKHIS_", "MLFLOW_", "KAGGLE_", "AWS_", "GX_"),
    *("XLA_", "KERAS_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "OV_", "LC_", "XDG_"),
    # TensorFlow's by longer prefixes: Terraform keeps its tokens under TF_, too.
    *("TF_CPP_", "TF_CUDNN_", "TF_DETERMINISTIC_", "TF_DISABLE_", "TF_ENABLE_", "TF_FORCE_", "TF_GPU_", "TF_NUM_"),
    *("TF_USE_", "TF_XLA_"),
)
_EXCLUDED_PREFIXES = (
    "BREAKHIS_AIRFLOW_",  # the service account, for those stages alone that are given the connection
    "BREAKHIS_AUDIT_KEY",  # likewise: whoever has it can write the audit log
    "MLFLOW_FLASK_SERVER_SECRET_KEY",  # keys of an MLflow server in the same environment
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY",
    "MLFLOW_AUTH_",
)


def select_stage_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the part of ``environ`` that a stage gets, with unbuffered output for the task's log."""
    selected = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_INCLUDED_PREFIXES)) and not name.startswith(_EXCLUDED_PREFIXES)
    }
    return {**selected, "PYTHONUNBUFFERED": "1"}


def select_container_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the part of a stage's environment that holds in a container, too."""
    excluded = (
        "BREAKHIS_DOCKER_",
        "BREAKHIS_HOME",
        "BREAKHIS_CONF",
        "BREAKHIS_TRAINING_SETS",
        "CUDA_",
        "NVIDIA_",
        "XDG_",
    )
    return {
        name: value
        for name, value in environment.items()
        if name not in _MACHINE_NAMES and not name.startswith(excluded)
    }
