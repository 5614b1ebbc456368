"""MLflow's store: where it is, opening it, and what went wrong with it in a sentence."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from flows.stages import one_line
from flows.workspace import SQLITE, read_params

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own number makes it try for minutes to reach a server that is not there.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

LATER = "The results are not lost: python -m flows.track logs them later."
_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(Exception):
    """Nothing was logged; the message is the cause and what to do, in a sentence."""


@dataclass(frozen=True)
class Place:
    """Where the runs are.

    Attributes:
        uri: as MLflow takes it, with an absolute path.
        shown: the same without a password.
        experiment: name of the experiment.
        folder: of the database; None for a server.
    """

    uri: str
    shown: str
    experiment: str
    folder: Path | None


def find_store() -> Place:
    """The store that MLFLOW_TRACKING_URI names, or else params.yaml.

    Raises:
        TrackingError: it is neither a SQLite file nor a server.
    """
    settings = read_params().get("mlflow") or {}
    experiment = settings.get("experiment", "emloc")
    where, uri = "mlflow.tracking_uri", settings.get("tracking_uri", f"{SQLITE}mlflow.db")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        where = "MLFLOW_TRACKING_URI"
        uri = os.environ[where]
    if uri.startswith(SQLITE) and uri != SQLITE:
        file = Path(uri.removeprefix(SQLITE)).absolute()
        uri = f"{SQLITE}{file.as_posix()}"
        return Place(uri, uri, experiment, file.parent)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        return Place(uri, _without_password(uri), experiment, None)
    raise TrackingError(
        f"{where} is {_without_password(uri)!r}, but runs are kept in a SQLite file or by an "
        "MLflow server: write sqlite:///mlflow.db or http://SERVER:5000."
    )


def _without_password(uri: str) -> str:
    return re.sub("//[^/]*@", "//", uri)


@contextlib.contextmanager
def open_store() -> Iterator[tuple[MlflowClient, str]]:
    """A client and the id of the experiment, for one writer on this machine at a time.

    Raises:
        TrackingError: the store cannot be used, here or in the block.
    """
    place = find_store()
    folder = place.folder / "mlartifacts" if place.folder else Path(".emloc")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "mlflow.lock"):
            yield _connect(place)
    except Exception as error:
        if isinstance(error, TrackingError) or not _is_of_the_store(error):
            raise
        raise TrackingError(_explain(error, place)) from error


def _connect(place: Place) -> tuple[MlflowClient, str]:
    for chatty in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(place.uri)
    if client.get_experiment_by_name(place.experiment) is None:
        location = (place.folder / "mlartifacts").as_uri() if place.folder else None
        try:
            client.create_experiment(place.experiment, location, _TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another machine, just now
                raise
    experiment: Any = client.get_experiment_by_name(place.experiment)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"The experiment {place.experiment!r} is deleted in the MLflow store {place.shown}: "
            f"restore it (mlflow experiments restore --experiment-id {experiment.experiment_id}), "
            f"or write another name into mlflow.experiment. {LATER}"
        )
    return client, experiment.experiment_id


def _is_of_the_store(error: Exception) -> bool:
    """Whether MLflow, its database, its server or the disk raised it, and not a bug of ours."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    kinds: tuple[Any, ...] = (MlflowException, CommandError, SQLAlchemyError, RequestException)
    return isinstance(error, (*kinds, OSError))


def _explain(error: Exception, place: Place) -> str:
    import mlflow

    reason = one_line(error)
    if "Can't locate revision" in reason or "out-of-date database schema" in reason:
        return (
            f"The MLflow store {place.shown} was written by another version of MLflow than "
            f"{mlflow.__version__}, which is installed: upgrade mlflow (or, if the store is the "
            f"older one, run mlflow db upgrade {place.shown}), or name another store in "
            f"mlflow.tracking_uri. {LATER}"
        )
    if place.folder is None and ("Max retries exceeded" in reason or "timed out" in reason):
        return (
            f"No MLflow server answers at {place.shown}: start it, or name another store in "
            f"mlflow.tracking_uri. {LATER}"
        )
    reason = str(error).partition("\n")[0].removesuffix(".")
    return f"The MLflow store {place.shown} cannot be used ({reason}). {LATER}"
