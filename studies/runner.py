"""From a study file to finished runs: the corpora, the queue, the workers of this machine, stage after stage.

Any number of these, on one machine or on several that share the runs' directory and the storage, work on one study.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from config import BadInput
from data.mixtures import prepare_all
from files import write_text
from program import FAILED, FINISHED, PREEMPTED, warn
from studies.crew import Crew
from studies.design import design, forecast
from studies.queue import Queue
from studies.results import is_finished
from studies.space import Point, Study
from studies.storage import storage_url, without_password
from tracking.run_directory import check_config

SHOWN = 5  # of many mistakes of one kind


def run_study(study: Study) -> int:
    """All runs of the study, stage after stage, as far as they are not finished; returns the exit code.

    Raises BadInput for runs of another config in the study's directory, for text that cannot be read and for a
    storage that cannot be reached, before anything is started.
    """
    points = study.points()
    number = max(len(points), 1 + (study.trials or 0))
    print(f"{number} points, {len(study.rungs[0])} to {len(study.seeds)} seeds each in the search", flush=True)
    for warning in study.warnings():
        warn(warning)
    queue, crew = begin(study, design(study).wanted, stages=True)
    known = design(study)
    left = unfinished(study, known.wanted)
    # What failed before is tried again first and alone, since the stages after it depend on it.
    queue.fill([pair for pair in left if known.result(*pair).over] or left, study.trials or 0)
    # What failed is over for the forecast, and is run again all the same.
    crew.work(max(forecast(known), len(left)) if left or queue.searching() else 0)
    return outcome(crew, lambda: design(study).wanted)


def run_pairs(study: Study, pairs: list[tuple[Point, int]]) -> int:
    """Runs beside the study's stages (pilots, other amounts of text), as far as they are not finished; the exit code.

    Raises BadInput as run_study does.
    """
    queue, crew = begin(study, pairs)
    left = unfinished(study, pairs)
    queue.fill(left)
    crew.work(len(left))
    return outcome(crew, lambda: pairs)


def begin(study: Study, pairs: list[tuple[Point, int]], stages: bool = False) -> tuple[Queue, Crew]:
    """What stands before any run: configs checked, corpora prepared, the study written down for the workers."""
    points = {point.name: point for point, _ in pairs}
    sources = [study.config(point, 0).data for point in points.values()]
    check_runs(study, pairs)
    for data in {source.model_dump_json(): source for source in sources}.values():
        prepare_all(data)  # once, not by every worker
    queue = Queue(study)
    file = study.directory / "study.yaml"
    shown, password = without_password(storage_url(study))
    # Others may read the file: the workers get the password by their environment.
    stored = study.resolved() | ({"storage": shown} if study.storage else {})
    write_text(file, yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
    return queue, Crew(study, file, {} if password is None else {"PGPASSWORD": password}, stages)


def outcome(crew: Crew, wanted: Callable[[], list[tuple[Point, int]]]) -> int:
    """The exit code, once the workers are done; what is not finished is told."""
    if crew.told_to_stop:
        print("stopped; the same command goes on from here", flush=True)
        return PREEMPTED
    missing = unfinished(crew.study, wanted())
    for point, seed in missing[:SHOWN]:
        warn(f"{point.name} seed {seed} is not finished; see {crew.study.run_directory(point, seed) / 'train.log'}")
    if missing:
        warn(f"{len(missing)} runs are not finished; the same command goes on with them")
    return FAILED if missing else FINISHED


def unfinished(study: Study, pairs: list[tuple[Point, int]]) -> list[tuple[Point, int]]:
    """Those of the runs that are not finished."""
    return [(point, seed) for point, seed in pairs if not is_finished(study.run_directory(point, seed))]


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
