"""How the runs of a study are started: forked, they are what they would be when started by hand; or by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY
from made_up_study import make_study
from safetensors.numpy import load_file
from test_run import numbers
from test_study_runner import (
    PATIENCE,
    finish,
    runs_and_workers,
    said,
    start,
    stopped_in_its_first_run,
    wait_for,
    write_study,
)

from config import BadInput, Config
from hardware import missing_for_compile
from studies import processes
from studies.crew import Crew
from studies.space import read_study
from studies.sweep import sweep_yaml
from studies.worker import Worker, gains_by_compiling
from tracking.run_directory import read_summary

pytestmark = pytest.mark.timeout(3 * PATIENCE)
needs_fork = pytest.mark.skipif(not processes.CAN_FORK, reason="runs are forked on Linux only")


def in_a_new_process(code: str, directory: Path, *words: str) -> str:
    """What the Python ``code`` says; its errors are in it."""
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True).stdout


FORKS = """
import atexit, signal, sys, wave
from studies.processes import fork
atexit.register(lambda: open("atexit.txt", "a").write("parent "))
signal.signal(signal.SIGTERM, lambda *_: open("handled.txt", "w"))
signal.signal(signal.SIGUSR1, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in a shell's background ignore
with open("log.txt", "a") as log:
    child = fork(sys.argv[1:], {"MINE": "yes"}, log)
    print(child.wait(60), end="")
"""
FORKED = """
import atexit, os, signal, sys
atexit.register(lambda: open("atexit.txt", "a").write("child "))
handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
print(__name__, sys.argv[1:], "wave" in sys.modules, os.getpgrp() == os.getpid(), repr(sys.stdin.read()))
print(os.environ["MINE"], handlers == [signal.SIG_DFL, signal.SIG_DFL, signal.default_int_handler])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), file=sys.stderr)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "raises":
    raise KeyError("what is missing")
sys.exit(int(sys.argv[1]))
"""


@needs_fork
@pytest.mark.parametrize(("word", "code"), [("0", "0"), ("3", "3"), ("raises", "1"), ("killed", "-15")])
def test_a_forked_script_finds_what_a_new_process_has(word: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FORKED)
    assert in_a_new_process(FORKS, tmp_path, str(tmp_path / "script.py"), word, "--x=1") == code
    log = (tmp_path / "log.txt").read_text()
    expected = [f"__main__ ['{word}', '--x=1'] True True ''", "yes True", "set()"]
    assert not set(expected) - set(log.splitlines()) or word == "killed", log  # killed before it wrote
    assert ("KeyError: 'what is missing'" in log) == (word == "raises")
    # Each process does at its end what was asked for in it, and nothing of the other's.
    assert (tmp_path / "atexit.txt").read_text() == ("parent " if word == "killed" else "child parent ")
    assert not (tmp_path / "handled.txt").exists()


@needs_fork
def test_a_forked_run_is_the_one_begun_by_hand(tmp_path: Path) -> None:
    base: dict[str, dict[str, Any]] = {}
    knobs = TINY | {"data.path": "text.txt", "regularizers.residual_dropout": 0.1}
    for key, value in (knobs | {"regularizers.swa_every": 4, "training.max_steps": 60}).items():
        section, _, name = key.partition(".")
        base.setdefault(section, {})[name] = value
    base["run"]["dir"] = str(tmp_path / "runs")
    path = write_study(tmp_path, base=base, seeds=1)
    command = start(path)
    wait_for("a forked run", lambda: runs_and_workers(tmp_path))
    assert command.wait(PATIENCE) == 0, said(path)
    forked = tmp_path / "runs/s/weight_decay=1-seed0"
    words = (forked / "train.log").read_text().splitlines()[0].split()[1:]
    words = [f"--run.dir={tmp_path}/by_hand" if word.startswith("--run.dir") else word for word in words]
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True)
    by_hand = tmp_path / "by_hand" / forked.name
    for file in ("model", "optimizer"):
        one, other = (load_file(run / f"checkpoints/step_00000060/{file}.safetensors") for run in (forked, by_hand))
        assert one.keys() == other.keys()
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert numbers(forked) == numbers(by_hand)


RUNS_AFTER = """
import sys, threading
from studies.worker import import_what_a_run_imports
import_what_a_run_imports(compiled=False)
before = set(sys.modules)
assert threading.active_count() == 1
import train
assert train.main(sys.argv[1:]) == 0
print("new:", *sorted(set(sys.modules) - before))
"""


def test_a_forked_run_imports_next_to_nothing(tiny: Any, tmp_path: Path) -> None:
    said = in_a_new_process(RUNS_AFTER, tmp_path, *tiny(training__max_steps=3, run__resume="never"))
    new = said.splitlines()[-1].split()[1:]
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {name.partition(".")[0] for name in new} & ours <= {"train", "scripts"}, new
    assert len(new) < 60, new  # of some 2,500


RUNS_FROM_THE_START = """
import sys
import train, training.learner, training.step
def seen(place):
    print("at", place, *(name for name in ("torch._dynamo", "matplotlib") if name in sys.modules))
build, step = training.learner.build_optimizers, training.step.training_step
training.learner.build_optimizers = lambda *words: (seen("the optimizers"), build(*words))[1]
training.step.training_step = lambda *words: (seen("a step"), step(*words))[1]
assert train.main(sys.argv[1:]) == 0
seen("the end")
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_imports_no_compiler_and_matplotlib_at_its_end(optimizer: str, tiny: Any, tmp_path: Path) -> None:
    flags = tiny(training__max_steps=2, evaluation__every=1, optimizer__name=optimizer)
    said = in_a_new_process(RUNS_FROM_THE_START, tmp_path, *flags)
    seen = [line for line in said.splitlines() if line.startswith("at ")]
    assert seen == ["at the optimizers", *["at a step"] * 2, "at the end matplotlib"]


@pytest.mark.parametrize(("steps", "runs", "expected"), [(2_310, 10, False), (2_320, 10, True), (2_320, 9, False)])
def test_whether_a_study_is_compiled_is_estimated_for_all_of_its_runs(
    steps: int, runs: int, expected: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 25.9 ms, as worked by hand in test_hardware.py, with 886 thousand parameters; 2,315 a minute."""
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    monkeypatch.chdir(tmp_path)
    model = {"n_layers": 4, "d_model": 128, "n_heads": 4, "context_length": 64}
    data = {"corpus": "text", "path": str(text_file), "tokenizer": "byte", "split": "tail"}
    training = {"max_steps": steps, "global_batch_size": 12}
    config = Config.model_validate({"model": model, "data": data, "training": training})
    assert gains_by_compiling(config, 2, runs) == expected


def test_what_is_settled_for_a_study_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("studies.worker.gains_by_compiling", lambda config, threads, runs: asked.append(runs) or True)
    study = make_study(tmp_path)
    assert Worker(study, 1).settled_compile() is True
    longer = study.model_copy(update={"seeds": [*study.seeds, 99]})
    assert Worker(longer, 1).settled_compile() is True
    # 12 points on one seed, 5 on two and 3 on three, and the winner and the baseline on three fresh seeds.
    assert asked == [12 + 5 + 3 + 2 * 3]
    on_gpus = make_study(tmp_path, base={"run": {"dir": str(tmp_path), "device": "cuda"}})
    assert Worker(on_gpus, 1).settled_compile() is None  # there auto is on


class Started:
    """Stands for a worker that ended at once."""

    returncode = 0

    def wait(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        ([], {"processes": 2}, [(None, 4)]),
        ([], {"processes": 2, "workers": 2}, [(None, 2)] * 2),
        (["0", "1"], {}, [("0", 4), ("1", 4)]),
        (["0", "1"], {"workers": 4}, [("0", 2), ("1", 2), ("0", 2), ("1", 2)]),
        (["0", "1", "4", "5"], {"processes": 2}, [("0,1", 2), ("4,5", 2)]),
        (["0"], {"processes": 2}, "takes as many GPUs"),
    ],
)
def test_what_each_worker_has(
    gpus: list[str], asked: dict[str, Any], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs and threads of each process, on a machine of eight cores."""
    started: list[tuple[str | None, int]] = []

    def start(command: list[str], environment: dict[str, str], **_: object) -> Started:
        started.append((environment.get("CUDA_VISIBLE_DEVICES"), int(command[-1].removeprefix("--threads="))))
        return Started()

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("studies.processes.gpus", lambda: gpus)
    monkeypatch.setattr("studies.processes.start", start)
    monkeypatch.setattr("studies.crew.cores", lambda: 8)
    study = make_study(tmp_path, **asked)
    crew = Crew(study, tmp_path / "study.yaml", {})
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected):
            crew.work(1)
    else:
        crew.work(1)
        assert started == expected


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path: Path) -> None:
    """Under torchrun: stopped, gone on with, and as a W&B agent starts them."""
    path = write_study(tmp_path, processes=2, seeds=1)
    study = yaml.safe_load(path.read_text())
    study["base"]["training"] |= {"max_steps": 400, "micro_batch_size": 4}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    first = stopped_in_its_first_run(path)
    code, words = finish(path)
    assert code == 0, words
    for run in (tmp_path / "runs/s").glob("*-seed*"):
        summary = read_summary(run)
        assert summary["status"] == "finished" and summary["hardware"]["processes"] == 2
    assert "goes on from step" in (first / "train.log").read_text()

    command = yaml.safe_load(sweep_yaml(read_study(str(path))))["command"]
    words = {"${env}": "env", "${interpreter}": sys.executable, "${program}": str(ROOT / "train.py")}
    given = [f"--run.dir={tmp_path}/sweep", "--run.seed=0", "--regularizers.weight_decay=1"]
    command = [part for word in command for part in (given if word == "${args}" else [words.get(word, word)])]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (by_agent,) = (tmp_path / "sweep").iterdir()
    assert read_summary(by_agent)["hardware"]["processes"] == 2

    study["space"] = {"train_tokens": [20]}  # too short for a window, which train.py finds out
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    code, words = finish(path)
    assert code == 4 and "train_tokens=20 seed 0: failed, " in words and "torch.distributed" not in words, words
