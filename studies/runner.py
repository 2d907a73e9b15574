"""From a study file to finished runs: the corpora, the queue, the workers of this machine, the confirmation.

Any number of these, on one machine or on several that share the runs' directory and the storage, work on one study.
"""

from __future__ import annotations

import yaml

from config import BadInput
from data.prepare import prepare
from files import write_text
from program import FAILED, FINISHED, PREEMPTED, warn
from studies.crew import Crew
from studies.queue import Queue
from studies.results import collect, is_finished
from studies.space import Point, Study, confirmation_seeds
from studies.storage import storage_url, without_password
from tracking.run_directory import check_config

SHOWN = 5  # of many mistakes of one kind


def run_study(study: Study) -> int:
    """All runs of the study, as far as they are not finished; returns the exit code.

    Raises BadInput for runs of another config in the study's directory, for text that cannot be read and for a
    storage that cannot be reached, before anything is started.
    """
    points = study.points()
    searched = pairs(study)
    number = max(len(points), 1 + (study.trials or 0))
    print(f"{number * len(study.seeds)} runs: {number} points on {len(study.seeds)} seeds", flush=True)
    for warning in study.warnings():
        warn(warning)
    check_runs(study, searched)
    sources = [study.config(point, study.seeds[0]).data for point in points]
    for data in {source.model_dump_json(): source for source in sources}.values():
        prepare(data)  # once, not by every worker
    queue = Queue(study)
    file = study.directory / "study.yaml"
    shown, password = without_password(storage_url(study))
    # Others may read the file: the workers get the password by their environment.
    stored = study.resolved() | ({"storage": shown} if study.storage else {})
    write_text(file, yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))

    crew = Crew(study, file, {} if password is None else {"PGPASSWORD": password})
    queue.fill(unfinished(study, searched), study.trials or 0)
    # A point that is not chosen yet has no run that could be unfinished.
    crew.work(len(unfinished(study, searched)) + queue.searching().count(None) * len(study.seeds))
    # The queue need not be empty: another command may have put the confirmation there already.
    searched_all = queue.empty() or not (unfinished(study, pairs(study)) or queue.searching())
    best = to_confirm(study) if searched_all else None
    confirmed = [(point, seed) for point in (points[0], best) if best and point for seed in confirmation_seeds(study)]
    left = unfinished(study, confirmed)
    if left and best and not crew.told_to_stop:
        print(f"best so far: {best.name}; it and the baseline are run on fresh seeds to confirm it", flush=True)
        queue.fill(left)
        crew.work(len(left))
    if crew.told_to_stop:
        print("stopped; the same command goes on from here", flush=True)
        return PREEMPTED
    missing = unfinished(study, pairs(study) + confirmed)
    for point, seed in missing[:SHOWN]:
        warn(f"{point.name} seed {seed} is not finished; see {study.run_directory(point, seed) / 'train.log'}")
    if missing:
        warn(f"{len(missing)} runs are not finished; the same command goes on with them")
    return FAILED if missing else FINISHED


def pairs(study: Study) -> list[tuple[Point, int]]:
    """Every point that is known with every seed, the baseline first."""
    return [(point, seed) for point in study.points() for seed in study.seeds]


def unfinished(study: Study, wanted: list[tuple[Point, int]]) -> list[tuple[Point, int]]:
    """Those whose run is not finished, as its directory tells."""
    return [(point, seed) for point, seed in wanted if not is_finished(study.run_directory(point, seed))]


def to_confirm(study: Study) -> Point | None:
    """The point that is worth fresh seeds: the report's winner, if its every run counts and the baseline is beaten."""
    from studies.findings import find  # scipy takes a moment

    try:
        findings = find(study, collect(study))
    except BadInput:  # no run is finished
        return None
    best = findings.winner
    return best if best and findings.leads and len(findings.of(best)) == len(study.seeds) else None


def check_runs(study: Study, wanted: list[tuple[Point, int]]) -> None:
    """Raises BadInput naming the runs in the study's directory that were made with another config."""
    others: list[list[str]] = []
    for point, seed in wanted:
        try:
            check_config(study.run_directory(point, seed), study.config(point, seed))
        except BadInput as problem:
            others.append(str(problem).splitlines())
    if others:
        lines = [line for first, *differences in others[:SHOWN] for line in (f"  {first}", *differences[:-1])]
        lines += [f"  and {len(others) - SHOWN} more runs"] if len(others) > SHOWN else []
        way = "restore the base and the points, or give the study another 'name'"
        raise BadInput(
            "\n".join([f"{study.directory} holds runs that this study file does not describe; {way}", *lines])
        )
