"""Orchestration: Prefect flows around DVC stages, results in MLflow, emulators shared.

Nothing here computes. A stage is always run by the dvc command, so whoever has only dvc gets the
same artifacts. Importing this package switches off what its libraries would report to their makers.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # Prefect and MLflow
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
