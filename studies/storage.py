"""Where the queue of a study lives: the database's URL, its password kept to ourselves, and patience with it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from config import BadInput, Failure
from program import warn
from studies.space import Study

P = ParamSpec("P")
R = TypeVar("R")

AWAY = (SQLAlchemyError, StorageInternalError)  # what a database that is away raises
OUTAGE = 120.0  # seconds for which a database may be away
PAUSE = 2.0  # seconds between two tries


def storage_url(study: Study) -> URL:
    """The database's URL as SQLAlchemy wants it; psycopg 3 is the driver of PostgreSQL.

    Raises BadInput for one that cannot be read.
    """
    if study.storage is None:
        return URL.create("sqlite", database=str(Path(study.directory).resolve() / "study.db"))
    written = study.storage.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        url = make_url(written)
        # What is left of a password with an @ of its own would be taken for the host, and shown.
        understood = written.startswith("sqlite") or "@" not in f"{url.host}{url.database}"
    except (ValueError, ArgumentError):
        understood = False
    if not understood:
        raise BadInput(
            "the storage is no URL of the form postgresql://user:password@host:port/database; "
            "in a password @ is written %40, : %3A and / %2F"
        )
    return url


def without_password(url: URL) -> tuple[str, str | None]:
    """The URL as text that may be shown and stored, and the password that was in it."""
    password = url.password if url.password is not None else url.query.get("password")
    shown = URL.create(
        url.drivername, url.username, None, url.host, url.port, url.database, url.query
    ).difference_update_query(["password"])
    return shown.render_as_string(hide_password=False), None if password is None else str(password)


def why_away(problem: BaseException) -> str:
    """Why a database cannot be used, in a line."""
    cause = problem.__cause__ if isinstance(problem, StorageInternalError) and problem.__cause__ else problem
    return str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]


def patient(method: Callable[P, R]) -> Callable[P, R]:
    """The same method, tried again while the database is away.

    Raises Failure when it is away for more than OUTAGE seconds.
    """

    @functools.wraps(method)
    def tried(*arguments: P.args, **options: P.kwargs) -> R:
        end: float | None = None
        while True:
            try:
                return method(*arguments, **options)
            except AWAY as problem:
                reason = why_away(problem)
                if end is None:
                    end = time.monotonic() + OUTAGE
                    warn(f"the study's storage does not answer ({reason}); trying again for {OUTAGE:.0f} seconds")
                elif time.monotonic() > end:
                    raise Failure(
                        f"the study's storage was away for {OUTAGE:.0f} seconds ({reason}); "
                        "bring it back, then the same command goes on from here"
                    ) from None
            time.sleep(PAUSE)

    return tried
