"""The queue of a study: which runs wait, which are being run, in a database that several machines can share.

Optuna keeps it. The queue only shares work out: whether a run is finished is told by its directory. So a task that
is handed out twice, because its worker seemed dead, costs a look and no run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from config import BadInput
from studies.knobs import name_of, whole
from studies.space import Point, Range, Study, confirmation_seeds

HEARTBEAT = 3  # seconds between two signs of life of a worker
GRACE = 12  # seconds of silence after which its task is handed to another


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: a point on one seed, or, searched for, on all seeds of the study."""

    trial: int  # the trial's identity in the database
    point: Point
    seeds: list[int]
    searched: bool


class Queue:
    """The tasks of one study.

    Raises BadInput when the database cannot be reached.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        study.directory.mkdir(parents=True, exist_ok=True)
        # Optuna says at INFO what we say ourselves, and calls its heartbeat experimental.
        optuna.logging.set_verbosity(logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        url = storage_url(study)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            options["connect_args"] = {"timeout": 60}
        try:
            with self.alone():  # two processes that make a fresh database at the same time break each other
                self.storage = RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
                self.shared = optuna.create_study(
                    study_name=study.name,
                    storage=self.storage,
                    load_if_exists=True,
                    direction="minimize" if study.minimize else "maximize",
                )
        except ImportError:
            raise BadInput("a postgresql storage needs psycopg: pip install 'psycopg[binary]>=3.2'") from None
        except SQLAlchemyError as problem:
            reason = str(getattr(problem, "orig", None) or problem).strip().splitlines()[0]
            raise BadInput(
                f"cannot open the storage {self.storage_name()}: {reason}; start its server, mend the URL, or leave "
                "'storage' out for a SQLite file"
            ) from None

    def storage_name(self) -> str:
        """The storage's URL without its password."""
        before, at, after = storage_url(self.study).rpartition("@")
        return before.rsplit(":", 1)[0] + at + after if at and before.count(":") > 1 else before + at + after

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this study changes the queue meanwhile."""
        with open(self.study.directory / "queue.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def fill(self, wanted: list[tuple[Point, int]], trials: int = 0) -> None:
        """Let the runs ``wanted`` wait, and as many searches that ``trials`` there are in all, if they do not yet.

        Runs that wait and are none of the study's any more, or whose point has other knobs now, are taken out.
        """
        with self.alone():
            points = {point.name: point for point in self.study.points()}
            seeds = {*self.study.seeds, *confirmation_seeds(self.study)}
            for trial in self._trials(TrialState.WAITING):
                told = trial.user_attrs
                point = points.get(told.get("point", ""))
                gone = point is None or told["seed"] not in seeds or told["knobs"] != as_stored(point.knobs)
                if key(trial) and gone:
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            there = self._trials(TrialState.WAITING, TrialState.RUNNING)
            busy = {key(trial) for trial in there}
            # A search that has chosen its point trains it on all seeds.
            busy |= {(trial.user_attrs.get("found"), seed) for trial in there for seed in self.study.seeds}
            for point, seed in wanted:
                if (point.name, seed) not in busy:
                    self.shared.enqueue_trial({}, user_attrs={"point": point.name, "knobs": point.knobs, "seed": seed})
            begun = [trial for trial in (*there, *self._trials(TrialState.COMPLETE)) if key(trial) is None]
            # A search whose runs failed is none to be repeated: its point is known, and its runs are wanted.
            failed = {trial.user_attrs.get("found") for trial in self._trials(TrialState.FAIL)}
            failed -= {trial.user_attrs.get("found") for trial in begun}
            for _ in range(trials - len(begun) - len(failed & {*points})):
                self.shared.enqueue_trial({})

    def searching(self) -> list[str | None]:
        """The searches that wait or are being run: the point of each, None where it is not chosen yet."""
        there = self._trials(TrialState.WAITING, TrialState.RUNNING)
        return [trial.user_attrs.get("found") for trial in there if key(trial) is None]

    def claim(self) -> Task | None:
        """A task for this worker alone, or None when nothing waits. A dead worker's task waits again."""
        with self.alone():
            fail_stale_trials(self.shared)
            points = {point.name: point for point in self.study.points()}
            for trial in self._trials(TrialState.WAITING):
                self.storage.record_heartbeat(trial._trial_id)
                if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    return self._task(trial, points)
        return None

    def busy(self) -> int:
        """How many tasks are being run, by any worker of any machine."""
        return len(self._trials(TrialState.RUNNING))

    def empty(self) -> bool:
        """Whether nothing waits and nothing is being run."""
        return not self._trials(TrialState.WAITING, TrialState.RUNNING)

    def beat(self, task: Task) -> None:
        """A sign of life. A database that is away for a while does not hinder a run."""
        try:
            self.storage.record_heartbeat(task.trial)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            pass

    def put_back(self, task: Task) -> None:
        """Let the task wait for another worker, or for the next start."""
        self._set(task, TrialState.WAITING)

    def tell(self, task: Task, value: float | None) -> None:
        """The task is done; ``value`` None: it failed. What is not finite is the worst value there is."""
        if value is None:
            self._set(task, TrialState.FAIL)
            return
        worst = math.inf if self.study.minimize else -math.inf
        self._set(task, TrialState.COMPLETE, [value if math.isfinite(value) else worst])

    def _set(self, task: Task, state: TrialState, values: list[float] | None = None) -> None:
        try:
            self.storage.set_trial_state_values(task.trial, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # we were taken for dead, and whoever took over was faster

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.shared.get_trials(deepcopy=False, states=states)

    def _task(self, trial: FrozenTrial, points: dict[str, Point]) -> Task:
        told = trial.user_attrs
        if "point" in told:  # by its name: what the study file says of it may have changed since
            point = points.get(told["point"], Point(told["point"], told["knobs"]))
            return Task(trial._trial_id, point, [told["seed"]], searched=False)
        # A searched point: what an earlier worker chose before it died is kept by the trial.
        # A seed of its own for each: workers do not draw the same, and one worker alone draws the same each time.
        self.shared.sampler = optuna.samplers.TPESampler(seed=trial.number)
        chooser = optuna.Trial(self.shared, trial._trial_id)
        knobs = {knob: choose(chooser, knob, side) for knob, side in self.study.ranges().items()}
        point = Point(name_of(knobs), knobs)
        self.storage.set_trial_user_attr(trial._trial_id, "found", point.name)
        return Task(trial._trial_id, point, self.study.seeds, searched=True)


def key(trial: FrozenTrial) -> tuple[str, int] | None:
    """Point and seed of a trial; None for a searched one."""
    told = trial.user_attrs
    return (told["point"], told["seed"]) if "point" in told else None


def as_stored(knobs: dict[str, Any]) -> Any:
    """Knobs as the database gives them back."""
    return json.loads(json.dumps(knobs))


def choose(trial: optuna.Trial, knob: str, side: Range | list[Any]) -> Any:
    """The search's value of a knob; a real number to four digits, so that the point's name tells all of it."""
    if not isinstance(side, Range):
        return trial.suggest_categorical(knob, side)
    if whole(knob):
        return trial.suggest_int(knob, math.ceil(side.min), math.floor(side.max), log=side.log)
    value = float(f"{trial.suggest_float(knob, side.min, side.max, log=side.log):.4g}")
    return min(max(value, side.min), side.max)


def storage_url(study: Study) -> str:
    """The database's URL as SQLAlchemy wants it; psycopg 3 is the driver of PostgreSQL."""
    if study.storage is None:
        return f"sqlite:///{Path(study.directory).resolve() / 'study.db'}"
    return study.storage.replace("postgresql://", "postgresql+psycopg://", 1)
