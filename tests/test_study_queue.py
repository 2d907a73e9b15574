"""The queue of a study, its workers and its database, without a run being trained."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from made_up_study import make_study, write_run
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from test_study_runner import write_study

from config import BadInput, Failure
from studies.design import design
from studies.queue import Queue
from studies.runner import unfinished
from studies.space import Study, read_study
from studies.storage import storage_url, without_password
from studies.worker import Worker


def test_the_queue_hands_each_task_out_once_and_again_when_its_worker_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.queue.GRACE", 1)
    monkeypatch.chdir(tmp_path)
    study = read_study(str(write_study(tmp_path)))
    wanted = [(point, seed) for point in study.points() for seed in study.seeds]
    one, other = Queue(study), Queue(study)
    one.fill(wanted)
    other.fill(wanted)
    claimed = [queue.claim() for queue in (one, other, one, other)]
    assert sorted((task.point.name, task.seeds[0]) for task in claimed if task) == [
        (point.name, seed) for point, seed in wanted
    ]
    assert one.claim() is None and not one.empty()
    silent, *alive = [task for task in claimed if task]
    for _ in range(6):
        time.sleep(0.5)
        for task in alive:
            one.beat(task)
    again = other.claim()
    assert again is not None and (again.point, again.seeds) == (silent.point, silent.seeds) and other.claim() is None
    one.tell(silent, 1.0)  # it was not dead after all
    for task in (again, *alive):
        other.put_back(task)
    fewer = read_study(str(write_study(tmp_path, seeds=1)))
    Queue(fewer).fill([(point, 0) for point in fewer.points()])
    left = [one.claim() for _ in range(3)]
    assert sorted(task.seeds[0] for task in left if task) == [0, 0]  # what the study has no more is taken out


def test_what_waits_is_trained_with_the_knobs_that_the_study_file_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def study(decay: float, baseline: float) -> Study:
        space = [{"name": "heavy", "weight_decay": decay}]
        values = {"search": "list", "space": space, "baseline": {"weight_decay": baseline}, "seeds": 1}
        return read_study(str(write_study(tmp_path, **values)))

    def tasks(of: Study) -> list[tuple[str, dict[str, Any]]]:
        queue = Queue(of)
        queue.fill([(point, 0) for point in of.points()])
        claimed = []
        while (task := queue.claim()) is not None:
            claimed.append(task)
        for task in claimed:
            queue.put_back(task)
        return sorted((task.point.name, task.point.knobs) for task in claimed)

    knob = "regularizers.weight_decay"
    assert tasks(study(1, 0.1)) == [("baseline", {knob: 0.1}), ("heavy", {knob: 1.0})]
    edited = study(2, 0.2)
    assert [task.point.knobs[knob] for _ in range(2) if (task := Queue(edited).claim())] == [0.2, 2.0]  # not refilled
    edited = study(3, 0.3)
    assert tasks(edited) == []  # they are being trained
    shutil.rmtree(tmp_path / "runs")
    tasks(study(1, 0.1))
    assert tasks(edited) == [("baseline", {knob: 0.3}), ("heavy", {knob: 3.0})]
    waiting = Queue(edited)._trials(TrialState.WAITING)  # nor do the old knobs stay in the database
    assert sorted(trial.user_attrs["knobs"][knob] for trial in waiting) == [0.3, 3.0]


def test_a_search_is_extended_by_seeds_and_repeats_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def study(**changes: Any) -> Study:
        space = {"weight_decay": {"min": 0.5, "max": 2}}
        return read_study(str(write_study(tmp_path, search="tpe", space=space, **changes)))

    def fill(of: Study) -> Queue:
        queue = Queue(of)
        queue.fill(unfinished(of, design(of).wanted), of.trials or 0)
        return queue

    one = study(trials=2, seeds=1)
    queue = fill(one)
    tasks = [task for _ in range(3) if (task := queue.claim())]
    found = [task.point for task in tasks if task.searched]
    for task in tasks:
        write_run(one, task.point, 0, 4.0, status="failed" if task.point == found[1] else "finished")
        queue.tell(task, None if task.point == found[1] else 4.0)
    assert len(found) == 2 and queue.empty()
    queue = fill(one)  # the failed run, and no third search
    task = queue.claim()
    assert task is not None and (task.point, task.seeds) == (found[1], [0]) and queue.claim() is None
    queue.tell(task, None)
    queue = fill(study(trials=3, seeds=4))
    tasks = [task for _ in range(9) if (task := queue.claim())]
    named = sorted((task.point.name, task.seeds[0]) for task in tasks if not task.searched)
    assert named == sorted([("baseline", 1), (found[0].name, 1), (found[1].name, 0), (found[1].name, 1)])
    searches = [task for task in tasks if task.searched]
    assert [task.seeds for task in searches] == [[0, 1]] and queue.searching() == [searches[0].point.name]
    write_run(one, searches[0].point, 0, 4.0, status="running")  # its search trains it: nobody else is to
    fill(study(trials=3, seeds=4))
    assert queue.claim() is None


def test_two_studies_of_one_name_on_one_server_are_two(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    one, other = (make_study(tmp_path / name, storage=storage, seeds=1) for name in ("one", "other"))
    Queue(one).fill([(one.points()[0], 0)])
    assert Queue(other).empty() and not Queue(one).empty()
    assert Queue(other).claim() is None and Queue(one).claim() is not None


def test_a_search_whose_values_changed_is_refused_before_work_starts(tmp_path: Path) -> None:
    space = {"weight_decay": [0.1, 1], "lr": {"min": 1e-4, "max": 1e-2, "log": True}}
    first = make_study(tmp_path, search="tpe", trials=1, seeds=1, space=space)
    queue = Queue(first)
    queue.fill([], 1)
    assert queue.claim() is not None
    wider = {"weight_decay": [0.1, 1], "lr": {"min": 1e-5, "max": 1e-2, "log": True}}
    Queue(Study.model_validate(first.model_dump() | {"space": wider}))  # a range may grow
    for changed in (wider | {"weight_decay": [0.1, 1, 3]}, wider | {"lr": {"min": 1e-4, "max": 1e-2}}):
        with pytest.raises(BadInput, match=r"the search has begun with .* give the study another 'name'"):
            Queue(Study.model_validate(first.model_dump() | {"space": changed}))


def test_a_database_that_is_away_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("studies.storage.PAUSE", 0.01)
    study = make_study(tmp_path, seeds=1)
    queue, away = Queue(study), iter([OperationalError("x", {}, Exception("gone")), StorageInternalError("gone")])
    trials = queue._trials

    def flaky(*states: Any) -> Any:
        if problem := next(away, None):
            raise problem
        return trials(*states)

    monkeypatch.setattr(queue, "_trials", flaky)
    queue.fill([(study.points()[0], 0)])
    assert queue.claim() is not None
    assert capsys.readouterr().err.count("does not answer (gone); trying again for 120 seconds") == 1
    monkeypatch.setattr("studies.storage.OUTAGE", 0.05)
    away = iter([StorageInternalError("gone")] * 100)
    with pytest.raises(Failure, match=r"was away for .* seconds"):
        queue.empty()


def test_a_task_between_two_workers_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes back to waiting after this worker found none to claim and before it looks whether others are busy."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("studies.worker.PATIENCE", 0.01)
    study = make_study(tmp_path, seeds=1)
    worker, done = Worker(study, threads=1), []
    worker.queue.fill([(study.points()[0], 0)])
    held = worker.queue.claim()
    assert held is not None
    claim = worker.queue.claim

    def late() -> Any:
        task = claim()
        if task is None:
            worker.queue.put_back(held)
        return task

    def do(task: Any) -> None:
        done.append(task)
        worker.queue.tell(task, 1.0)
        monkeypatch.setattr(worker.queue, "claim", claim)

    monkeypatch.setattr(worker.queue, "claim", late)
    monkeypatch.setattr(worker, "_do", do)
    assert worker.work() == 0 and len(done) == 1


def test_no_password_is_shown_or_stored(tmp_path: Path) -> None:
    for written, password in (
        ("postgresql://me:se%40c/r:et@host:5/d", "se@c/r:et"),
        ("postgresql://me@host/d?password=se&connect_timeout=3", "se"),
    ):
        shown, kept = without_password(storage_url(make_study(tmp_path / password[:2] / written[-1], storage=written)))
        assert kept == password and "se" not in shown and "me@host" in shown
        assert storage_url(make_study(tmp_path / "again" / password[:3], storage=shown)).password is None
    for odd in ("postgresql://me:se@cr@host/d", "postgresql://me:s@e:c@host/d", "postgresql://me:s/e@c/r@host/d"):
        study = Study.model_validate({"name": "s", "seeds": 1, "space": {"weight_decay": [1]}, "storage": odd})
        with pytest.raises(BadInput, match="%40") as caught:
            storage_url(study)
        assert "host/d" not in str(caught.value)


def test_a_combination_that_no_config_allows_costs_its_own_trial_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of the tests' own process
    # Each value alone is possible, and together they are too many to be tried beforehand.
    space = {"ema_decay": [0.5, 0.9], "swa_start": [0.25, 0.5], "weight_decay": [row / 100 for row in range(100)]}
    study = read_study(str(write_study(tmp_path, search="tpe", trials=3, space=space)))
    worker = Worker(study, threads=1)
    worker.queue.fill([], 3)
    assert worker.work() == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("not possible" in line and "exclude each other" in line for line in said)
    assert worker.queue.empty() and study.points() == study.points()[:1]
