"""The workers of this machine: started, listened to, stopped, and told when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from config import BadInput
from program import STOP_SIGNALS, cores, warn
from studies import processes
from studies.results import is_finished
from studies.space import Study


class Crew:
    """The workers of this machine, what they say, and the signals passed on to them.

    ``stages``: they go on from stage to stage of the study; else they do what waits in the queue.
    """

    def __init__(self, study: Study, file: Path, environment: dict[str, str], stages: bool = False) -> None:
        self.study = study
        self.file = file
        self.environment = environment
        self.stages = stages
        self.workers: list[subprocess.Popen[str]] = []
        self.told_to_stop = False
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: object) -> None:
        if self.told_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the workers end with us
        self.told_to_stop = True
        print("\nstopping: the runs finish their step and save; Ctrl-C again ends them without that", flush=True)
        for worker in self.workers:
            worker.terminate()

    def work(self, left: int) -> None:
        """Start the workers for ``left`` runs, show what they do, return when the queue is empty or we are stopped."""
        if not left:
            return
        before, began = self._finished(), time.monotonic()
        number, said = self._start(left)
        with open(said) as lines, tqdm(total=left, unit="run", disable=None, desc=self.study.name) as bar:
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

    def _start(self, left: int) -> tuple[int, int]:
        """Start the workers; returns their number and the file descriptor from which their words are read."""
        each = self.study.processes
        device = self.study.config(self.study.points()[0], 0).run.device
        gpus = processes.gpus() if device in ("auto", "cuda") else []
        if gpus and each > len(gpus):
            raise BadInput(f"processes: {each} takes as many GPUs for a run, and this machine has {len(gpus)}")
        asked = self.study.workers
        number = (len(gpus) // each or max(1, min(cores() // each, left))) if asked == "auto" else asked
        command = [sys.executable, "-m", "studies.worker", str(self.file)]
        command += [f"--threads={max(1, cores() // (number * each))}", *["--stages"] * self.stages]
        paths = filter(None, [str(processes.ROOT), os.environ.get("PYTHONPATH")])
        environment = self.environment | {"PYTHONPATH": os.pathsep.join(paths)}
        print(f"about {left} runs to go, {number} at a time, in {self.study.directory}", flush=True)
        read, write = os.pipe()
        for index in range(number):
            if gpus:  # where there are more workers than GPUs, they share them
                its = [gpus[(index * each + process) % len(gpus)] for process in range(each)]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(its)
            self.workers.append(processes.start(command, environment, stdout=write))
        os.close(write)
        if self.told_to_stop:  # while they were started
            for worker in self.workers:
                worker.terminate()
        return number, read

    def _finished(self) -> int:
        return sum(is_finished(path.parent) for path in self.study.directory.glob("*-seed*/summary.json"))


def tell(bar: tqdm, line: str) -> None:
    """A line above the bar on a terminal, a plain line elsewhere."""
    if bar.disable:
        print(line, flush=True)
    else:
        bar.write(line)
