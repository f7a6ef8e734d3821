"""What a stage may see of the Airflow worker's environment.

A worker's environment holds Airflow's own secrets: the database's address, the Fernet and JWT keys, connections. None
of them is a stage's business, so a stage gets what is named here and nothing else.
"""

from collections.abc import Mapping

_MACHINE = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH"),
        *("MPLCONFIGDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    }
)
"""What is true of one machine only, or of one image."""

_NAMES = _MACHINE | {
    *("LANG", "LANGUAGE", "TZ", "PYTHONHASHSEED", "PYTHONWARNINGS", "NO_COLOR", "DO_NOT_TRACK"),
    # the way out
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
}
_PREFIXES = (
    *("BREAKHIS_", "MLFLOW_", "KAGGLE_", "AWS_", "GX_"),
    *("XLA_", "KERAS_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "OV_", "LC_", "XDG_"),
    # TensorFlow's, family by family: Terraform keeps its tokens under TF_, too.
    *("TF_CPP_", "TF_CUDNN_", "TF_DETERMINISTIC_", "TF_DISABLE_", "TF_ENABLE_", "TF_FORCE_", "TF_GPU_", "TF_NUM_"),
    *("TF_USE_", "TF_XLA_"),
)
_NEVER = (
    "BREAKHIS_AIRFLOW_",  # the service account, which only the stage that is given the connection may use
    "BREAKHIS_AUDIT_KEY",  # likewise: who has it can write the record of decisions
    "MLFLOW_FLASK_SERVER_SECRET_KEY",  # keys of the MLflow server, where it shares our environment
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY",
    "MLFLOW_AUTH_",
)


def stage_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of ``environ`` that a stage is given; output is set to come unbuffered, for the task's log."""
    passed = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_PREFIXES)) and not name.startswith(_NEVER)
    }
    return {**passed, "PYTHONUNBUFFERED": "1"}


def container_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of a stage's environment that holds in a container, too."""
    own = ("BREAKHIS_DOCKER_", "BREAKHIS_HOME", "BREAKHIS_CONF", "BREAKHIS_TRAINING_SETS", "CUDA_", "NVIDIA_", "XDG_")
    return {name: value for name, value in environment.items() if name not in _MACHINE and not name.startswith(own)}
