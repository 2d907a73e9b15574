"""One worker of a study: takes tasks from the queue and trains each with train.py, until the queue is empty.

A process of its own, started by crew.py. It imports torch and what else a run imports once, and then forks a process
for each run, which is train.py as it would be when started by hand. It computes nothing itself, since threads and
GPUs do not survive a fork. It prints one line for each run that ends.

    python -m studies.worker STUDY.yaml --threads=1
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from config import BadInput, Config
from files import is_locked
from program import FINISHED, PREEMPTED, import_torch, run
from studies.design import design, forecast
from studies.processes import CAN_FORK, ROOT, Forked, fork, gpus, start
from studies.queue import HEARTBEAT, Queue, Task
from studies.results import is_finished, metric_value
from studies.space import Study, read_study
from studies.storage import patient
from tracking.run_directory import read_summary, update_summary

# By train.py and by the pictures; the rest comes with these.
IMPORTED_ON_THE_WAY = (
    *("data.mixtures", "evaluation.judge", "training.failures", "training.heartbeat"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
STAGES = {
    "search": "the search goes on: the best points on another seed",
    "tuning": "tuning: the best points and the baseline at several learning rates, on seeds of their own",
    "fresh": "best so far: {winner}; it and the baseline are run on fresh seeds, by which nothing was chosen",
}
PATIENCE = 1.0  # seconds between two looks at what another worker is busy with


class Worker:
    """Takes tasks until none waits and none is being run, or until it is told to stop."""

    def __init__(self, study: Study, threads: int, stages: bool = False) -> None:
        self.study = study
        self.threads = threads
        self.stages = stages  # whether to go on to the next stage of the study when nothing waits
        self.given_up: set[tuple[str, int]] = set()  # runs that ended without a trace that others could see
        self.forks = CAN_FORK and study.processes == 1
        self.compile: bool | None = None  # for all runs of the study; None: each decides for itself
        self.queue = Queue(study)
        self.child: subprocess.Popen[str] | Forked | None = None
        self.told_to_stop = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True
        if self.child is not None:
            self.child.terminate()  # it finishes its step, saves and leaves

    def work(self) -> int:
        """Returns the exit code."""
        if self.forks:
            import_torch()
            self.compile = self.settled_compile()
            import_what_a_run_imports(compiled=bool(self.compile))
        while not self.told_to_stop:
            task = self.queue.claim()
            if task is not None:
                self._do(task)
            elif not self.queue.empty():  # a task that is being run waits again when its worker dies
                time.sleep(PATIENCE)
            elif not (self.stages and self._go_on()):
                return FINISHED
        return PREEMPTED

    def _go_on(self) -> bool:
        """Let the runs of the next stage wait; returns whether there are any. What failed is not tried again."""
        known = design(self.study)
        left = [(point, seed) for point, seed in known.wanted if not known.result(point, seed).over]
        left = [(point, seed) for point, seed in left if (point.name, seed) not in self.given_up]
        if left:
            self.queue.fill(left)
            print(STAGES[known.stage].format(winner=known.winner.name if known.winner else ""), flush=True)
        return bool(left)

    @patient
    def settled_compile(self) -> bool | None:
        """What ``run.compile: auto`` is on CPUs for every run of the study: settled by the first worker, and kept."""
        study, points = self.study, self.study.points()
        config = study.config(points[0], study.seeds[0])
        if config.run.device not in ("auto", "cpu") or (config.run.device == "auto" and gpus()):
            return None
        with self.queue.alone():
            settled: bool | None = self.queue.shared.user_attrs.get("compile")
            if settled is None:
                settled = gains_by_compiling(config, self.threads, forecast(design(study)))
                self.queue.shared.set_user_attr("compile", settled)
        return settled

    def _do(self, task: Task) -> None:
        try:
            self.study.config(task.point, task.seeds[0])
        except BadInput as problem:  # a search can put together what no config allows
            print(f"{task.point.name}: not possible, {'; '.join(str(problem).splitlines())}", flush=True)
            self.queue.tell(task, None)
            return
        values = []
        for seed in task.seeds:
            ended = self._run(task, seed)
            if ended is None:
                self.queue.put_back(task)
                return
            if not ended:
                self.given_up.add((task.point.name, seed))
                self.queue.tell(task, None)
                return
            value = metric_value(self.study.run_directory(task.point, seed), self.study.metric)
            values.append(math.nan if value is None else value)
        self.queue.tell(task, sum(values) / len(values))

    def _run(self, task: Task, seed: int) -> bool | None:
        """Train one run to its end, whoever began it: True, finished; False, failed; None, told to stop."""
        directory = self.study.run_directory(task.point, seed)
        directory.mkdir(exist_ok=True)
        log, name, began = directory / "train.log", f"{task.point.name} seed {seed}", time.monotonic()
        while True:
            while is_locked(directory / "lock") and not self.told_to_stop:
                self.queue.beat(task)
                time.sleep(PATIENCE)
            if is_finished(directory):
                return True
            if self.told_to_stop:
                return None
            before = log.stat().st_size if log.exists() else 0
            code = self._train(task, seed, log)
            said = log.read_bytes()[before:].decode(errors="replace")
            if code == FINISHED and is_finished(directory):
                value = metric_value(directory, self.study.metric)
                number = "no finite value" if value is None else f"{value:.4f}"
                print(f"{name}: {self.study.metric} {number}, {time.monotonic() - began:.0f} s", flush=True)
                return True
            if self.told_to_stop:
                return None
            if code == PREEMPTED or "Stopped after" in said or "is in use by" in said:  # torchrun tells no code
                continue  # it was stopped by someone else, or another was faster: look again
            reason = reason_of(said, code)
            if not is_locked(directory / "lock"):
                update_summary(directory, status="failed", error=reason)
            print(f"{name}: failed, {reason}; see {log}", flush=True)
            return False

    def _train(self, task: Task, seed: int, log: Path) -> int:
        """Start train.py, give signs of life while it runs, and return its exit code."""
        config = self.study.config(task.point, seed)
        # A run that goes on keeps what it began with, since its bits depend on it.
        began_on = read_summary(log.parent).get("hardware", {})
        words = [str(ROOT / "train.py"), *flags(config)]
        if config.run.threads == "auto":
            words.append(f"--run.threads={began_on.get('threads', self.threads)}")
        if config.run.compile == "auto" and self.compile is not None:
            words.append(f"--run.compile={'on' if began_on.get('compile', self.compile) else 'off'}")
        if self.study.processes > 1:
            words = [*torchrun(self.study.processes), *words]
        variables = {"WANDB_JOB_TYPE": task.point.name}
        with open(log, "a") as output:
            print("$", *words, file=output, flush=True)
            if self.forks:
                self.queue.storage.engine.dispose()  # a connection cannot belong to two processes; it is made anew
                self.child = fork(words, variables, output)
            else:
                self.child = start([sys.executable, *words], variables, stdout=output, stderr=subprocess.STDOUT)
            if self.told_to_stop:  # between the last look and the start
                self.child.terminate()
            while True:
                self.queue.beat(task)
                try:
                    code = self.child.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    pass
        self.child = None
        return code


def import_what_a_run_imports(compiled: bool) -> None:
    """Import what train.py does on the way, so that a process forked from this one has it."""
    import_torch()
    for name in (*IMPORTED_ON_THE_WAY, *["torch._dynamo"] * compiled):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the garbage collector of each run would look through all that is imported, and copy its memory


def gains_by_compiling(config: Config, threads: int, runs: int) -> bool:
    """Whether as many ``runs`` like that of ``config`` are done earlier on CPUs when they are compiled."""
    import torch

    from data.loader import TrainingLoader
    from data.mixtures import open_data
    from hardware import Hardware, estimated_seconds, missing_for_compile, worth_compiling
    from model.gpt import GPT
    from training.progress import Plan

    threads = threads if config.run.threads == "auto" else config.run.threads
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", compile=False, threads=threads)
    try:
        corpus = open_data(config.data, quiet=True, verify=False)
        sizes = config.model.context_length, config.training.global_batch_size
        plan = Plan.of(config, TrainingLoader(corpus.portions("train"), config.data, config.run.seed, *sizes))
    except BadInput:  # which the run will tell
        return False
    with torch.device("meta"):  # of which nothing is computed
        model = GPT(config.model, corpus.vocab_size, config.regularizers)
    seconds = estimated_seconds(hardware, config, model.count_parameters(), plan.total_steps)
    return worth_compiling(seconds, runs) and not missing_for_compile()


def torchrun(processes: int) -> list[str]:
    """What stands between python and train.py when a run takes several processes."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def flags(config: Config) -> list[str]:
    """The command line of a run: what differs from the defaults."""
    default = Config().flat()
    return [f"--{knob}={text(value)}" for knob, value in config.flat().items() if value != default[knob]]


def text(value: object) -> str:
    """A knob's value as the command line reads it back."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).splitlines()[0]


def reason_of(said: str, code: int) -> str:
    """Why a run failed: its last words, or how it died."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in said.splitlines() if line.strip(" =") and not line.startswith("$")]
    errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
    return errors[0].removeprefix("error: ") if errors else f"exit code {code}"


def main(arguments: list[str]) -> int:
    """What runner.py starts."""
    parser = argparse.ArgumentParser("python -m studies.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of each run")
    parser.add_argument("--stages", action="store_true", help="go on to the next stage when nothing waits")
    options = parser.parse_args(arguments)
    return Worker(read_study(options.study), options.threads, options.stages).work()


if __name__ == "__main__":
    run(main)
