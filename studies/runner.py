"""From a study file to finished runs: the corpora, the queue, the workers of this machine, stage after stage.

Any number of these, on one machine or on several that share the runs' directory and the storage, work on one study.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from config import BadInput
from data.prepare import prepare
from files import write_text
from program import FAILED, FINISHED, PREEMPTED, cores, warn
from studies import processes
from studies.design import Design, design
from studies.queue import Queue
from studies.results import is_finished
from studies.space import Point, Study
from studies.storage import storage_url, without_password
from tracking.run_directory import check_config

SHOWN = 5  # of many mistakes of one kind
STAGES = {
    "search": "search: every point on few seeds, the best on more",
    "tuning": "tuning: the best points and the baseline at several learning rates, on seeds of their own",
    "fresh": "best so far: {winner}; it and the baseline are run on fresh seeds, by which nothing was chosen",
    "done": "runs that failed earlier are tried again",
}


def run_study(study: Study) -> int:
    """All runs of the study, stage after stage, as far as they are not finished; returns the exit code.

    Raises BadInput for runs of another config in the study's directory, for text that cannot be read and for a
    storage that cannot be reached, before anything is started.
    """
    points = study.points()
    number = max(len(points), 1 + (study.trials or 0))
    print(f"{number} points on {len(study.rungs[0])} seeds, the best on more", flush=True)
    for warning in study.warnings():
        warn(warning)
    queue, crew = begin(study, design(study).wanted)
    tried: set[Any] = set()  # by this command: what failed, or has nobody left to do it, is tried once
    while not crew.told_to_stop:
        known = design(study)
        queue.fill([], study.trials or 0)
        searches = queue.searching()
        todo = [pair for pair in runs_to_start(known, bool(searches)) if (pair[0].name, pair[1]) not in tried]
        new = {(point.name, seed) for point, seed in todo} | set(enumerate(searches))
        if new <= tried:
            break
        tried |= new
        queue.fill(todo)
        print(STAGES[known.stage].format(winner=known.winner.name if known.winner else ""), flush=True)
        # A point that is not chosen yet has no run that could be unfinished.
        crew.work(len(todo) + searches.count(None) * len(study.rungs[0]))
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


def begin(study: Study, pairs: list[tuple[Point, int]]) -> tuple[Queue, Crew]:
    """What stands before any run: configs checked, corpora prepared, the study written down for the workers."""
    points = {point.name: point for point, _ in pairs}
    sources = [study.config(point, 0).data for point in points.values()]
    check_runs(study, pairs)
    for data in {source.model_dump_json(): source for source in sources}.values():
        prepare(data)  # once, not by every worker
    queue = Queue(study)
    file = study.directory / "study.yaml"
    shown, password = without_password(storage_url(study))
    # Others may read the file: the workers get the password by their environment.
    stored = study.resolved() | ({"storage": shown} if study.storage else {})
    write_text(file, yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
    return queue, Crew(study, file, {} if password is None else {"PGPASSWORD": password})


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


def runs_to_start(known: Design, searching: bool) -> list[tuple[Point, int]]:
    """What is wanted now. What failed earlier comes first and alone, since later stages depend on it.

    ``searching``: whether points are still being found, before which none goes on to more seeds.
    """
    left = [pair for pair in unfinished(known.study, known.wanted) if not searching or pair[1] in known.study.rungs[0]]
    return [pair for pair in left if known.result(*pair).over] or left


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


class Crew:
    """The workers of this machine, what they say, and the signals passed on to them."""

    def __init__(self, study: Study, file: Path, environment: dict[str, str]) -> None:
        self.study = study
        self.file = file
        self.environment = environment
        self.workers: list[subprocess.Popen[str]] = []
        self.told_to_stop = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, _: object) -> None:
        if self.told_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the workers end with us
        self.told_to_stop = True
        print("\nstopping: the runs finish their step and save", flush=True)
        for worker in self.workers:
            worker.terminate()

    def work(self, left: int) -> None:
        """Start the workers for ``left`` runs, show what they do, return when the queue is empty or we are stopped."""
        if not left:
            return
        device = self.study.config(self.study.points()[0], 0).run.device
        gpus = processes.gpus() if device in ("auto", "cuda") else []
        asked = self.study.workers
        number = (len(gpus) or max(1, min(cores(), left))) if asked == "auto" else asked
        command = [sys.executable, "-m", "studies.worker", str(self.file)]
        command.append(f"--threads={max(1, cores() // number)}")
        paths = filter(None, [str(processes.ROOT), os.environ.get("PYTHONPATH")])
        environment = self.environment | {"PYTHONPATH": os.pathsep.join(paths)}
        print(f"{left} runs to go, {number} at a time, in {self.study.directory}", flush=True)
        read, write = os.pipe()
        before, began = self._finished(), time.monotonic()
        for index in range(number):
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
            self.workers.append(processes.start(command, environment, stdout=write))
        os.close(write)
        if self.told_to_stop:  # while they were started
            for worker in self.workers:
                worker.terminate()
        with open(read) as lines, tqdm(total=left, unit="run", disable=None, desc=self.study.name) as bar:
            for count, line in enumerate(lines):  # until the last worker ends
                tell(bar, line.rstrip())
                bar.update(self._finished() - before - bar.n)
                if count == 0 and left > number:
                    minutes = (time.monotonic() - began) * -(-left // number) / 60
                    tell(bar, f"at this pace all take about {minutes:.1f} minutes")
        for worker in self.workers:
            if worker.wait() < 0 and not self.told_to_stop:
                warn(f"a worker was killed by {signal.Signals(-worker.returncode).name}; others take over its run")
        self.workers = []

    def _finished(self) -> int:
        return sum(is_finished(path.parent) for path in self.study.directory.glob("*-seed*/summary.json"))


def tell(bar: tqdm, line: str) -> None:
    """A line above the bar on a terminal, a plain line elsewhere."""
    if bar.disable:
        print(line, flush=True)
    else:
        bar.write(line)
