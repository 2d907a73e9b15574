"""Kill, damage and resume runs at random until time is up: make soak, or make soak MINUTES=60 SEED=7.

Each run trains with every regularizer on and strict sums, is struck again and again, goes on with 1, 2 or 4
processes as the draw will have it, and must end as the run that nobody touched: same numbers at each step, same
samples, same bits of weights and moments.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from conftest import ROOT, TINY, flags_of, made_up_text
from launch import workers_of
from oracle import flip, launched, same_as
from test_regularized_run import EVERYTHING
from tqdm import tqdm

from tracking.metrics import read_metrics
from tracking.run_directory import read_summary
from training.checkpoint import existing, problem_of

KNOBS = TINY | {f"regularizers.{name}": str(value) for name, value in EVERYTHING.items()}
KNOBS |= {
    "training.deterministic": "strict",
    "training.micro_batch_size": "2",
    "training.max_steps": "120",
    "training.max_attempts": "1000000",
    "training.hang_timeout": "8",
    "evaluation.every": "24",
    "checkpoint.every": "5",
    "checkpoint.keep": "2",
    "tracking.log_every": "1",
}
NOTHING = "nothing: it ran to its end"
SECONDS_TO_END = 120  # within which a struck launch must be gone

Struck = collections.Counter[str]


def main() -> int:
    """Until time is up: a run from start to end under fire, then the comparison. 0 when none differed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long to go on (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="of what is struck, and when (default: the clock's)")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    text = directory / "text.txt"
    text.write_text(made_up_text())
    print(f"seed {seed}, {options.minutes:g} minutes, files in {directory}")
    with launched([*flags_of(KNOBS, text, directory), "--run.name=alone"], directory) as process:
        assert process.wait() == 0, "the run that nothing disturbs failed"

    draw, struck, ended = random.Random(seed), Struck(), 0
    deadline = time.monotonic() + 60 * options.minutes
    seconds = round(60 * options.minutes)
    bar = tqdm(total=seconds, disable=None, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}")
    while time.monotonic() < deadline:
        name = f"run{ended}"
        flags = [*flags_of(KNOBS, text, directory), f"--run.name={name}"]
        run = directory / "runs" / name
        try:
            while read_summary(run).get("status") != "finished":
                left = deadline - time.monotonic()
                struck[strike_once(flags, run, draw) if left > 0 else go_on(flags, run)] += 1
                bar.set_postfix_str(f"{struck.total() - struck[NOTHING]} faults, {ended} runs", refresh=False)
                bar.update(seconds - round(max(0, left)) - bar.n)
            same_as(directory / "runs/alone", run)
        except (AssertionError, subprocess.TimeoutExpired) as difference:
            bar.close()
            print(f"run {ended} differs or did not end, after {dict(struck)} (seed {seed}): {difference}")
            print(f"It is kept in {run}; what it said is in {directory / 'output.txt'}")
            return 1
        shutil.rmtree(run)
        ended += 1
    bar.close()
    shutil.rmtree(directory)
    del struck[NOTHING]
    for what, count in struck.most_common():
        print(f"{count:5d}  {what}")
    print(f"{struck.total()} faults survived in {ended} runs; no number, sample or bit differed")
    return 0


def strike_once(flags: list[str], run: Path, draw: random.Random) -> str:
    """Damage its files, or start it and strike it; what was done, once nothing of it is left running."""
    between = draw.random()
    if between < 0.1 and damage_newest(run, draw):
        return "newest checkpoint damaged"
    if between < 0.2 and (run / "metrics.jsonl").is_file():
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 999, "train/lo')
        return "last line of metrics.jsonl torn"
    world = draw.choice((1, 1, 2, 4))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    launcher += [f"--max-restarts={draw.choice((0, 0, 1))}"]
    environment, planned = os.environ | {}, ""
    if draw.random() < 0.25:
        point = draw.choice(("gradient", "weights", "save-begin", "save-file", "save-state", "save-manifest"))
        action, rank = ("kill", 0) if "save" in point else (draw.choice(("kill", "raise")), draw.randrange(world))
        step = (len(read_metrics(run)) // 5 + draw.randint(1, 3)) * 5
        environment["WELLPOSED_FAULT"] = f"{point}:{rank}:{step}:{action}"
        planned = f"{action} at {point}"
    with (run.parents[1] / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *(launcher if world > 1 else []), str(ROOT / "train.py"), *flags],
            cwd=run.parents[1],
            env=environment,
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        if not planned:
            return hit(process, run, world, draw)
        assert ends(process, SECONDS_TO_END), f"{planned}: it was still there {SECONDS_TO_END} s later"
        return NOTHING if read_summary(run).get("status") == "finished" else planned
    finally:
        process.kill()
        process.wait()


def hit(process: subprocess.Popen[str], run: Path, world: int, draw: random.Random) -> str:
    """Wait until it starts up or works, strike, wait until all of it is gone; what was done."""
    starting = draw.random() < 0.2
    until, reached = time.monotonic() + draw.uniform(0.1, 4), len(read_metrics(run)) + draw.randint(0, 15)
    while process.poll() is None and (time.monotonic() < until if starting else len(read_metrics(run)) < reached):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    if process.poll() is not None:
        assert read_summary(run).get("status") == "finished", "it ended by itself before it was finished"
        return NOTHING
    workers = list(workers_of(process.pid).values()) if world > 1 else [process.pid]
    to_torchrun = not workers or (world > 1 and draw.random() < 0.25)
    names = ["SIGKILL", "SIGKILL", "SIGTERM"]
    names += [] if to_torchrun else ["SIGUSR1"]  # which torchrun does not know
    names += ["SIGSTOP"] * draw.randint(0, 1) if world > 1 and not to_torchrun else []
    name, target = draw.choice(names), process.pid if to_torchrun else draw.choice(workers)
    with suppress(ProcessLookupError):  # it may end by itself at that moment
        os.kill(target, signal.Signals[name])
        if name == "SIGSTOP":  # the others leave when their patience is over; the one that hangs must be killed
            ends(process, 25)
            os.kill(target, signal.SIGKILL)
    deadline = time.monotonic() + SECONDS_TO_END
    assert ends(process, SECONDS_TO_END), f"{name} was sent, and it was still there {SECONDS_TO_END} s later"
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, f"{name} to {target}: of {workers} some outlived {process.pid}"
        time.sleep(0.01)
    where = "torchrun" if to_torchrun else f"one of {world} processes" if world > 1 else "the only process"
    return f"{name} to {where}{', starting' if starting else ''}"


def go_on(flags: list[str], run: Path) -> str:
    """Run to the end, undisturbed."""
    with launched(flags, run.parents[1]) as process:
        assert process.wait(timeout=SECONDS_TO_END) == 0, "it did not finish when it was left alone"
    return NOTHING


def ends(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether it ends within so many seconds."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def damage_newest(run: Path, draw: random.Random) -> bool:
    """Flip a bit in, or cut, a file of the newest checkpoint, if the one before it can be trusted."""
    kept = existing(run / "checkpoints")
    if len(kept) < 2 or problem_of(kept[1]):
        return False
    file = draw.choice(sorted(path for path in kept[0].iterdir() if path.is_file()))
    size = file.stat().st_size
    if draw.random() < 0.5 and size:
        flip(file, draw.randrange(size))
    else:
        os.truncate(file, draw.randrange(size))
    return True


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing had differed so far") from None
