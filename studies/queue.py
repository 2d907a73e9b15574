"""The queue of a study: which runs wait, which are being run, in a database that several machines can share.

Optuna keeps it. The queue only shares work out: whether a run is finished is told by its directory. So a task that
is handed out twice, because its worker seemed dead, costs a look and no run.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

import files
from config import BadInput
from studies.knobs import name_of, whole
from studies.space import FRESH_SEEDS, Point, Range, Study
from studies.storage import AWAY, patient, storage_url, why_away, without_password

HEARTBEAT = 3  # seconds between two signs of life of a worker
GRACE = 12  # seconds of silence after which its task is handed to another


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: a point on one seed, or, searched for, on the seeds that all points get."""

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
        if url.drivername.startswith("sqlite"):
            options["connect_args"] = {"timeout": 60}
        try:
            with self.alone():  # two processes that make a fresh database at the same time break each other
                self.storage = RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
                self.shared = optuna.create_study(
                    study_name=self._name(),
                    storage=self.storage,
                    load_if_exists=True,
                    direction="minimize" if study.minimize else "maximize",
                )
        except ImportError:
            raise BadInput("a postgresql storage needs psycopg: pip install 'psycopg[binary]>=3.2'") from None
        except AWAY as problem:
            raise BadInput(
                f"cannot open the storage {without_password(url)[0]}: {why_away(problem)}; start its server, mend the "
                "URL (a password can be in PGPASSWORD too), or leave 'storage' out for a SQLite file"
            ) from None
        self._check_search()

    def _name(self) -> str:
        """The name in the database: on one server two directories may hold studies of one name."""
        path = self.study.directory / "queue.id"
        if not path.exists():
            files.write_text(path, uuid.uuid4().hex[:8])
        return f"{self.study.name}-{path.read_text()}"

    @patient
    def _check_search(self) -> None:
        """Raises BadInput for a search that was begun among values, or on a scale, that the study file has no more."""
        if self.study.search != "tpe":
            return
        begun = {knob: known for trial in self._trials() for knob, known in trial.distributions.items()}
        for knob, side in self.study.ranges().items():
            if knob not in begun:
                continue
            try:
                optuna.distributions.check_distribution_compatibility(begun[knob], distribution(knob, side))
            except ValueError:
                raise BadInput(
                    f"the search has begun with {knob} as {begun[knob]}, and such values or their scale cannot change "
                    "on the way; restore them, or give the study another 'name'"
                ) from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this study changes the queue meanwhile."""
        with files.lock(self.study.directory / "queue.lock", wait=True):
            yield

    @patient
    def fill(self, wanted: list[tuple[Point, int]], trials: int = 0) -> None:
        """Let the runs ``wanted`` wait, and as many searches that ``trials`` there are in all, if they do not yet.

        Runs that wait and are none of the study's any more, or whose point has other knobs now, are taken out.
        """
        with self.alone():
            points = {point.name: point for point in self.study.points()}
            for trial in self._trials(TrialState.WAITING):
                told = trial.user_attrs
                point = points.get(told.get("origin") or told.get("point", ""))
                changed = point is not None and not told.get("origin") and told.get("knobs") != as_stored(point.knobs)
                other_seed = told.get("seed", FRESH_SEEDS) not in (*self.study.seeds, *range(FRESH_SEEDS, 10**6))
                if key(trial) and (point is None or changed or other_seed):
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            there = self._trials(TrialState.WAITING, TrialState.RUNNING)
            busy: set[Any] = {key(trial) for trial in there}
            # A search that has chosen its point trains it on the first seeds.
            busy |= {(trial.user_attrs.get("found"), seed) for trial in there for seed in self.study.rungs[0]}
            for point, seed in wanted:
                if (point.name, seed) not in busy:
                    told = {"point": point.name, "knobs": point.knobs, "seed": seed, "origin": point.origin}
                    self.shared.enqueue_trial({}, user_attrs=told)
            begun = [trial for trial in (*there, *self._trials(TrialState.COMPLETE)) if key(trial) is None]
            # A failed trial is not replaced: its point is known and its runs are wanted already.
            failed = {trial.user_attrs.get("found") for trial in self._trials(TrialState.FAIL)}
            failed -= {trial.user_attrs.get("found") for trial in begun}
            for _ in range(trials - len(begun) - len(failed & {*points})):
                self.shared.enqueue_trial({})

    @patient
    def searching(self) -> list[str | None]:
        """The searches that wait or are being run: the point of each, None where it is not chosen yet."""
        there = self._trials(TrialState.WAITING, TrialState.RUNNING)
        return [trial.user_attrs.get("found") for trial in there if key(trial) is None]

    @patient
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

    @patient
    def empty(self) -> bool:
        """Whether nothing waits and nothing is being run, by any worker of any machine."""
        with self.alone():  # a task on its way from a dead worker to the next is neither
            return not self._trials(TrialState.WAITING, TrialState.RUNNING)

    def beat(self, task: Task) -> None:
        """A sign of life. A database that is away for a while does not hinder a run."""
        with suppress(*AWAY):
            self.storage.record_heartbeat(task.trial)

    @patient
    def put_back(self, task: Task) -> None:
        """Let the task wait for another worker, or for the next start."""
        self._set(task, TrialState.WAITING)

    @patient
    def tell(self, task: Task, value: float | None) -> None:
        """The task is done; ``value`` None: it failed. What is not finite is the worst value there is."""
        if value is None:
            self._set(task, TrialState.FAIL)
            return
        worst = math.inf if self.study.minimize else -math.inf
        self._set(task, TrialState.COMPLETE, [value if math.isfinite(value) else worst])

    def _set(self, task: Task, state: TrialState, values: list[float] | None = None) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # taken for dead, and who took over was faster
            self.storage.set_trial_state_values(task.trial, state, values)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.shared.get_trials(deepcopy=False, states=states or None)

    def _task(self, trial: FrozenTrial, points: dict[str, Point]) -> Task:
        told = trial.user_attrs
        if "point" in told:  # by its name: what the study file says of it may have changed since
            point = points.get(told["point"], Point(told["point"], told["knobs"], told.get("origin")))
            return Task(trial._trial_id, point, [told["seed"]], searched=False)
        # A searched point: what an earlier worker chose before it died is kept by the trial.
        # A seed of its own for each: workers do not draw the same, and one worker alone draws the same each time.
        self.shared.sampler = optuna.samplers.TPESampler(seed=trial.number)
        chooser = optuna.Trial(self.shared, trial._trial_id)
        knobs = {knob: choose(chooser, knob, side) for knob, side in self.study.ranges().items()}
        point = Point(name_of(knobs), knobs)
        self.storage.set_trial_user_attr(trial._trial_id, "found", point.name)
        return Task(trial._trial_id, point, self.study.rungs[0], searched=True)


def key(trial: FrozenTrial) -> tuple[str, int] | None:
    """Point and seed of a trial; None for a searched one."""
    told = trial.user_attrs
    return (told["point"], told["seed"]) if "point" in told else None


def as_stored(knobs: dict[str, Any]) -> Any:
    """Knobs as the database gives them back."""
    return json.loads(json.dumps(knobs))


def choose(trial: optuna.Trial, knob: str, side: Range | list[Any]) -> Any:
    """The search's value of a knob; a real number to four digits, so that the point's name tells all of it."""
    among = distribution(knob, side)
    if isinstance(among, CategoricalDistribution):
        return trial.suggest_categorical(knob, among.choices)
    if isinstance(among, IntDistribution):
        return trial.suggest_int(knob, among.low, among.high, log=among.log)
    value = float(f"{trial.suggest_float(knob, among.low, among.high, log=among.log):.4g}")
    return min(max(value, among.low), among.high)


def distribution(knob: str, side: Range | list[Any]) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    """What the search chooses a knob's value from, in Optuna's words."""
    if not isinstance(side, Range):
        return CategoricalDistribution(side)
    if whole(knob):
        return IntDistribution(math.ceil(side.min), math.floor(side.max), log=side.log)
    return FloatDistribution(side.min, side.max, log=side.log)
