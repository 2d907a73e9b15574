"""Studies as users run them: real workers, real train.py processes, killed at random times, on real databases."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, made_up_text
from made_up_study import make_study, write_run, write_runs

from config import BadInput
from scripts.study import main
from studies.design import design
from studies.queue import Queue
from studies.runner import run_study
from studies.space import read_study
from tracking.run_directory import read_summary

PATIENCE = 300  # seconds that one command may take on a busy machine: four runs, of which each imports torch anew
pytestmark = pytest.mark.timeout(3 * PATIENCE)


def write_study(directory: Path, **changes: Any) -> Path:
    """A study of tiny runs in ``directory``."""
    (directory / "text.txt").write_text(made_up_text())
    base: dict[str, dict[str, Any]] = {}
    knobs = TINY | {"data.path": "text.txt", "evaluation.every": 40, "training.max_steps": 40}
    for key, value in (knobs | {"checkpoint.every": 10, "evaluation.sample_tokens": 0}).items():
        section, _, name = key.partition(".")
        base.setdefault(section, {})[name] = value
    values: dict[str, Any] = {"name": "s", "base": base, "space": {"weight_decay": [0.1, 1]}, "seeds": 2}
    values |= {"confirm_seeds": 0, "workers": 1, "tune": None}
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def start(path: Path, *flags: str, action: str = "run") -> subprocess.Popen[str]:
    """The command, as a user in the study's directory starts it; its words go to a file beside the study."""
    with open(path.parent / "said.txt", "a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.study", action, str(path), *flags],
            cwd=path.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(path: Path, *flags: str, action: str = "run") -> tuple[int, str]:
    """Exit code and words of the command."""
    before = len(said(path))
    code = start(path, *flags, action=action).wait(PATIENCE)
    return code, said(path)[before:]


def said(path: Path) -> str:
    file = path.parent / "said.txt"
    return file.read_text() if file.exists() else ""


def processes(words: str) -> dict[int, tuple[int, str]]:
    """Process -> its parent and its command line, of all whose command line has ``words``."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if words in row[3] and "Z" not in row[2]}


def runs_and_workers(directory: Path) -> dict[int, int]:
    """Run -> its worker, of all forked runs of the studies in ``directory``: a forked run keeps its worker's words."""
    workers = processes(f"studies.worker {directory}")
    return {pid: parent for pid, (parent, _) in workers.items() if parent in workers}


def wait_for(what: str, condition: Any, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.05)


def stopped_in_its_first_run(path: Path) -> Path:
    """Start the study and stop it by Ctrl-C when its first run has a checkpoint; returns that run's directory."""
    command = start(path)
    first = path.parent / "runs/s/baseline-seed0"
    wait_for("a checkpoint", lambda: list(first.glob("checkpoints/step_*")))
    command.send_signal(signal.SIGINT)
    assert command.wait(PATIENCE) == 3, said(path)
    assert read_summary(first)["status"] == "preempted"
    return first


def trained_to_the_end(directory: Path) -> dict[str, int]:
    """How often each run was trained to its end, counted from what train.py said."""
    logs = sorted((directory / "runs/s").glob("*-seed*/train.log"))
    return {log.parent.name: log.read_text().count("Finished after") for log in logs}


def kill_one_of_four(path: Path, commands: int) -> None:
    """Four workers of one or four commands share the study; one dies by kill -9 while it trains."""
    study = yaml.safe_load(path.read_text())
    study["base"]["run"]["dir"] = str(path.parent / "runs")  # so that its processes are known by their words
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    names = [f"{point}-seed{seed}" for point in ("baseline", "weight_decay=1") for seed in range(study["seeds"])]
    flags = ["--workers", str(4 // commands)]
    started = {command.pid: command for command in (start(path, *flags) for _ in range(commands))}
    ours: dict[int, int] = {}
    wait_for("a run", lambda: ours.update(runs_and_workers(path.parent)) or ours)
    time.sleep(random.uniform(0, 1))
    child, worker = random.choice(list((runs_and_workers(path.parent) or ours).items()))
    command, _ = processes("studies.worker")[worker]
    assert command in started
    os.kill(worker, signal.SIGKILL)
    wait_for("the run of the killed worker to end", lambda: child not in processes("studies.worker"))
    codes = {pid: process.wait(PATIENCE) for pid, process in started.items()}
    if commands > 1:  # the command whose only worker is dead cannot go on
        assert codes.pop(command) == 4, said(path)
    assert set(codes.values()) == {0}, said(path)
    assert trained_to_the_end(path.parent) == dict.fromkeys(names, 1)
    assert all(read_summary(path.parent / "runs/s" / name)["status"] == "finished" for name in names)
    assert "killed by SIGKILL" in said(path)


@pytest.mark.slow
def test_four_workers_share_a_study_and_one_is_killed(tmp_path: Path) -> None:
    kill_one_of_four(write_study(tmp_path), commands=1)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """The URL of a PostgreSQL server of this test's own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    initdb = shutil.which("initdb", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if initdb is None:
        pytest.skip("no PostgreSQL server (initdb) is installed")
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": "/"}
    home = Path(tempfile.mkdtemp(dir="/tmp" if os.geteuid() == 0 else tmp_path))  # pytest's own is closed to others
    if os.geteuid() == 0:  # PostgreSQL refuses to be run by root
        import pwd

        user = next((name for name in ("postgres", "nobody") if name in {row.pw_name for row in pwd.getpwall()}), None)
        if user is None:
            pytest.skip("PostgreSQL needs another user than root, and there is neither postgres nor nobody")
        shutil.chown(home, user)
        options |= {"user": user}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "password").write_text("s@cret")
    (home / "password").chmod(0o644)
    access = ["-A", "scram-sha-256", "--pwfile", home / "password"]
    made = subprocess.run([initdb, "-D", home / "data", "-U", "tester", *access, "--no-sync"], **options)
    assert made.returncode == 0, made.stderr
    control = [str(Path(initdb).resolve().parent / "pg_ctl"), "-D", str(home / "data"), "-w", "-l", str(home / "log")]
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    # The server would hold pg_ctl's output open, and with it the pipes of capture_output.
    quiet = options | {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        assert subprocess.run([*control, "-o", settings, "start"], **quiet).returncode == 0, (home / "log").read_text()
        yield f"postgresql://tester:s%40cret@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_four_commands_share_a_study_over_postgresql_and_one_is_killed(tmp_path: Path, postgresql: str) -> None:
    path = write_study(tmp_path, storage=postgresql, seeds=1)
    kill_one_of_four(path, commands=4)
    stored = (tmp_path / "runs/s/study.yaml").read_text()
    assert "tester@127.0.0.1" in stored and "cret" not in stored + said(path)
    assert not (tmp_path / "runs/s/study.db").exists()


@pytest.mark.slow
def test_stopped_gone_on_with_and_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    short = path.read_text()
    base = yaml.safe_load(short)["base"]
    base["training"]["max_steps"] = 200
    base["evaluation"]["every"] = 200  # pictures are drawn with each, which takes longer than all steps
    longer = {"base": base, "space": {"weight_decay": [0.1]}, "baseline": {"weight_decay": 1}}  # which is too much
    path = write_study(tmp_path, **longer, seeds=1)
    first = stopped_in_its_first_run(path)
    assert "Traceback" not in said(path)

    # Started again with fresh seeds: the run goes on from its checkpoint, and the winner is confirmed.
    path = write_study(tmp_path, **longer, seeds=1, confirm_seeds=2)
    code, words = finish(path)
    assert code == 0 and "fresh seeds" in words, words
    assert "goes on from step" in (first / "train.log").read_text()
    names = [f"{point}-seed{seed}" for point in ("baseline", "weight_decay=0.1") for seed in (0, 1000, 1001)]
    assert trained_to_the_end(tmp_path) == dict.fromkeys(names, 1)
    path = write_study(tmp_path, **longer, seeds=2, confirm_seeds=2)  # a fresh seed never becomes one of the search
    code, words = finish(path)
    assert code == 0 and "2 runs to go" in words and "look 2 at fresh results" in words, words
    names += ["baseline-seed1", "weight_decay=0.1-seed1"]
    assert trained_to_the_end(tmp_path) == dict.fromkeys(sorted(names), 1)
    monkeypatch.chdir(tmp_path)
    assert main(["status", "study.yaml"]) == 0
    words = capsys.readouterr().out
    assert "8 finished" in words and "best so far" in words and "stage             done" in words, words

    # Another base under the same name is refused before anything is touched.
    write_study(tmp_path, **longer | {"base": yaml.safe_load(short)["base"]})
    with pytest.raises(BadInput, match=r"training\.max_steps: the run has 200, asked for is 40"):
        main(["run", "study.yaml"])
    assert trained_to_the_end(tmp_path) == dict.fromkeys(names, 1)


def test_a_failed_point_does_not_stop_the_others(tmp_path: Path) -> None:
    # That the text is too short for a window is found out by train.py only.
    path = write_study(tmp_path, seeds=1, space={"train_tokens": [20]})
    code, words = finish(path)
    assert code == 4 and "train_tokens=20 seed 0: failed, " in words, words
    assert "train_tokens=20 seed 0 is not finished; see " in words and "Traceback" not in words
    assert trained_to_the_end(tmp_path) == {"baseline-seed0": 1, "train_tokens=20-seed0": 0}
    summary = read_summary(tmp_path / "runs/s/train_tokens=20-seed0")
    assert summary["status"] == "failed" and summary["error"]
    _, words = finish(path, action="status")
    assert "1 finished" in words and "1 failed" in words


@pytest.mark.slow
def test_a_search_tries_as_many_points_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"weight_decay": {"min": "1e-3", "max": 10, "log": True}, "swa_every": {"min": 1, "max": 4}}
    path = write_study(tmp_path, search="tpe", trials=2, seeds=1, space=space)
    code, words = finish(path, "--workers", "2")
    assert code == 0, words
    ends = trained_to_the_end(tmp_path)
    assert len(ends) == 3 and set(ends.values()) == {1}
    monkeypatch.chdir(tmp_path)
    study = read_study("study.yaml")
    assert {study.run_directory(point, 0).name for point in study.points()} == set(ends)
    assert design(study).stage == "done"
    assert finish(path)[0] == 0 and trained_to_the_end(tmp_path) == ends  # and none more when started again


def test_a_run_that_failed_is_tried_again_though_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a study that an earlier version took further than this one would, of which more is done than is asked."""
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]}, confirm_seeds=0)
    write_runs(study, lambda point: 0.0)
    baseline = study.points()[0]
    for seed in (3, 4, 5):
        write_run(study, baseline, seed, 4.0)
    write_run(study, baseline, 1, 4.0, status="failed")
    worked: list[int] = []
    monkeypatch.setattr("studies.runner.prepare_all", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("studies.runner.Crew.work", lambda _, left: worked.append(left))
    assert run_study(study) == 4 and worked == [1]


def test_fresh_runs_that_another_command_began_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]}, seeds=1)
    write_runs(study, lambda point: -0.1 * (point.name == "weight_decay=3"))
    known = design(study)
    assert known.stage == "fresh"
    Queue(study).fill(known.wanted)
    worked: list[int] = []
    monkeypatch.setattr("studies.runner.prepare_all", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("studies.runner.Crew.work", lambda _, left: worked.append(left))
    assert run_study(study) == 4  # nobody worked
    assert worked == [6]


def test_a_process_does_not_outlive_the_one_that_started_it() -> None:
    if sys.platform != "linux":
        pytest.skip("the kernel's help for this is Linux's own")
    code = "import sys, time; from studies.processes import start; print(start(sys.argv[1:], {}).pid, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(999)", "sleep", "998"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert processes("sleep 998")[child][0] == parent.pid
        parent.kill()
        try:
            wait_for("the child to end", lambda: child not in processes("sleep 998"), patience=20)
        finally:
            if child in processes("sleep 998"):
                os.kill(child, signal.SIGKILL)


def test_a_storage_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    path = write_study(tmp_path, storage="postgresql://someone:secret@127.0.0.1:1/none")
    code, words = finish(path)
    assert code == 2 and "cannot open the storage" in words and "Traceback" not in words, words
    assert "secret" not in words
    code, words = finish(path, action="status")  # reads the runs' directories only
    assert code == 0 and "2 waiting" in words, words
    code, words = finish(path, action="report")
    assert code == 2 and "no run of study s is finished" in words and "Traceback" not in words, words
