"""Whatever becomes of W&B, training goes on, ends the same, and metrics.jsonl is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from oracle import Flags, Train, children, launched, same_as, wait_until_stopped


@pytest.fixture
def wandb_home(tmp_path: Path) -> dict[str, str]:
    """W&B's own directories in the test's."""
    names = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    return {name: str(tmp_path / name.lower()) for name in names}


class Refuses(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        """Unauthorized, whatever is asked."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = b'{"errors": [{"message": "permission denied"}]}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST

    def log_message(self, *words: object) -> None:
        """Nothing on the tests' standard error."""


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.fault(35)
def test_a_refused_key_costs_at_most_ten_seconds(
    whole_run: Path, refusing_server: str, train: Train, breakable: Flags, tmp_path: Path, wandb_home: dict[str, str]
) -> None:
    started = time.monotonic()
    key = {"WANDB_MODE": "online", "WANDB_BASE_URL": refusing_server, "WANDB_API_KEY": "0" * 40}
    ended = train(breakable(), **key, **wandb_home)
    assert ended.returncode == 0 and "W&B online is not to be had" in ended.stderr, ended.stderr
    assert time.monotonic() - started < 4 + 25  # 10 s more than the usual 4 on a machine alone; tests share it
    same_as(whole_run, tmp_path / "runs/tiny")
    assert list((tmp_path / "runs/tiny/wandb").glob("offline-run-*/run-*.wandb"))  # for `wandb sync`, later


@pytest.mark.slow
@pytest.mark.fault(35)
def test_the_death_of_its_process_is_told_once_and_costs_nothing(
    whole_run: Path, breakable: Flags, tmp_path: Path, wandb_home: dict[str, str]
) -> None:
    """wandb-core is killed while the run is held at step 8."""
    said = tmp_path / "said"
    at_8 = {"WANDB_MODE": "offline", "WELLPOSED_FAULT": "save-renamed:0:8:stop"}
    with (
        said.open("w") as errors,
        launched(breakable(), tmp_path, stderr=errors, **at_8, **wandb_home) as process,
    ):
        wait_until_stopped(process)
        (core,) = (pid for pid, name in children(process.pid) if name.startswith("wandb-core"))
        os.kill(core, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        started = time.monotonic()
        assert process.wait(timeout=60) == 0
    assert time.monotonic() - started < 4 + 10
    assert said.read_text().count("W&B stopped taking metrics") == 1
    same_as(whole_run, tmp_path / "runs/tiny")


def inspect(file: Path, home: dict[str, str]) -> list[dict[str, Any]]:
    """The records of an offline run's file."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    asked = subprocess.run(command, capture_output=True, text=True, env=os.environ | home, check=True)
    return [json.loads(line) for line in asked.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.fault(36)
def test_a_resume_goes_on_in_the_same_run_and_gives_no_step_twice(
    whole_run: Path, train: Train, breakable: Flags, tmp_path: Path, wandb_home: dict[str, str]
) -> None:
    """Asked to stop at step 8, where it is held, and started again."""
    at_8 = {"WANDB_MODE": "offline", "WELLPOSED_FAULT": "save-renamed:0:8:stop"}
    with launched(breakable(), tmp_path, **at_8, **wandb_home) as process:
        wait_until_stopped(process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 3
    run = tmp_path / "runs/tiny"
    identity = (run / "wandb_id").read_text().strip()
    ended = train(breakable(), WANDB_MODE="offline", **wandb_home)
    assert ended.returncode == 0, ended.stderr
    same_as(whole_run, run)
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    steps = []
    for file in files:
        records = inspect(file, wandb_home)
        assert [record["run"]["run_id"] for record in records if record["type"] == "run"][:1] == [identity]
        steps += [record["history"]["step"]["num"] for record in records if record["type"] == "history"]
    assert steps == list(range(1, 25)), steps
