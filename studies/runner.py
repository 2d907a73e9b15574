"""From a study file to finished runs: the corpora, the queue, the workers of this machine, the confirmation.

Any number of these, on one machine or on several that share the runs' directory and the storage, work on one study.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from config import BadInput
from data.prepare import prepare
from files import write_text
from program import FAILED, FINISHED, PREEMPTED, cores, warn
from studies import processes
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
