"""Where the numbers of a run go: metrics.jsonl is the truth, W&B mirrors it, the console shows it.

One line a logged step, with step, tokens and epoch on each. W&B may be unreachable, refuse, or die: training
goes on, and one warning says so.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from config import Config
from evaluation.diagnosis import diagnose
from evaluation.evaluate import Calibration
from pictures import curves, reliability
from tracking.run_directory import read_metrics, read_summary, say

SECONDS_BETWEEN_LINES = 5.0
WANDB_PATIENCE = 7  # seconds to wait for the server before going on without it


class Metrics:
    """Appends records to metrics.jsonl, mirrors them to W&B and tells the console.

    Opening it for a run that goes on from ``step`` drops later lines and a torn one: they are written again.
    """

    def __init__(self, directory: Path, config: Config, step: int, total_steps: int) -> None:
        self.directory = directory
        self.path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(directory) if record["step"] <= step]
        temporary = directory / ".metrics.jsonl.new"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self.file = open(self.path, "a")
        self.records = kept
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True, desc="training")
        self.told = time.monotonic()
        self.wandb = start_wandb(directory, config, resuming=step > 0)

    def log(self, record: dict[str, Any]) -> None:
        """One line: ``record`` has step, tokens, epoch and metrics."""
        # JSON has no word for nan and inf: what is not finite is logged as null.
        record = {key: finite(value) if isinstance(value, float) else value for key, value in record.items()}
        self.records.append(record)
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError:  # a full disk: the line waits in the file's buffer, and the next checkpoint's sync tells
            pass
        self._mirror(record)
        self._tell(record)

    def sync(self) -> None:
        """Bring all lines to the disk, before a checkpoint that counts on them; raises OSError when it refuses."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        """Close the files and the W&B run, whose summary gets ``summary``."""
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            try:
                self.wandb.summary.update(_flat(summary))
                self.wandb.finish(exit_code=exit_code)
            except Exception as problem:  # whatever a dead or unreachable W&B raises must not fail a run
                say(f"W&B did not take the summary ({problem}); metrics.jsonl is whole")

    def _mirror(self, record: dict[str, Any]) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.log({key: value for key, value in record.items() if key != "sample"}, step=record["step"])
        except Exception as problem:  # as above
            say(f"W&B stopped taking metrics ({problem}); metrics.jsonl has them all")
            self.wandb = None

    def _tell(self, record: dict[str, Any]) -> None:
        """The record in words: a line off a terminal, beside the bar on one."""
        self.bar.update(record["step"] - self.bar.n)
        evaluated = "val/loss" in record
        words = [f"step {record['step']:>6}/{self.bar.total}"]
        names = {
            "train/loss": "train",
            "val/loss": "val",
            "val_average/loss": "average",
            "val/bits_per_byte": "bits/byte",
        }
        for name, word in names.items():
            if name in record:
                words.append(f"{word} {record[name]:.4f}" if record[name] is not None else f"{word} not finite")
        if "train/lr" in record:
            words.append(f"lr {record['train/lr']:.2e}")
        if "train/tokens_per_second" in record:
            words.append(f"{record['train/tokens_per_second']:,.0f} tokens/s")
        if self.bar.disable:  # a file or a pipe: a line every few seconds is enough
            if evaluated or record["step"] == 1 or time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
                print("  ".join(words), flush=True)
                self.told = time.monotonic()
        elif evaluated:
            self.bar.write("  ".join(words))
        else:
            self.bar.set_postfix_str("  ".join(words[1:]))


def wandb_mode(config: Config) -> str:
    """online, offline or disabled: tracking.wandb, whose auto asks WANDB_MODE, and then whether one is logged in."""
    asked: str = config.tracking.wandb
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE", asked)
    if asked != "auto":
        return asked
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "disabled"


def start_wandb(directory: Path, config: Config, resuming: bool, job_type: str | None = None) -> Any:
    """The W&B run of this directory, or None. Unreachable or refused: offline, at most 10 seconds later."""
    mode = wandb_mode(config)
    if mode not in ("online", "offline"):
        if mode != "disabled":
            say(f"WANDB_MODE={mode} is none of online, offline, disabled; W&B is left out")
        return None
    import wandb

    # One id for one run directory, so that a resume goes on in the same W&B run.
    identity = directory / "wandb_id"
    if not identity.exists() or not identity.read_text().strip():  # empty: killed while it was written
        identity.write_text(secrets.token_hex(4))
    settings = wandb.Settings(init_timeout=WANDB_PATIENCE, console="off", silent=True)
    attempts: list[Any] = [mode] if mode == "offline" else [mode, "offline"]
    for attempt in attempts:
        try:
            run = wandb.init(
                project=config.tracking.project,
                group=config.tracking.group,
                job_type=job_type,
                tags=config.tracking.tags or None,
                name=directory.name,
                id=identity.read_text().strip(),
                config=config.model_dump(mode="json"),
                dir=str(directory),
                mode=attempt,
                resume="allow" if attempt == "online" else None,
                settings=settings,
            )
            run.define_metric("*", step_metric="step")
            return run
        except Exception as problem:  # login refused, server unreachable, service not starting
            first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            say(f"W&B {attempt} is not to be had ({first}); metrics.jsonl is written all the same")
            wandb.teardown()  # else the run's id stays taken, and the offline run after it is refused
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with dots in their keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def finite(value: float) -> float | None:
    """The value, or None if it is infinite or not a number."""
    return value if math.isfinite(value) else None


def draw(directory: Path, records: list[dict[str, Any]], config: Config, calibration: Calibration) -> None:
    """curves.png with the diagnosis so far, reliability.png and samples.txt, all made anew, if the disk has room."""
    samples = [f"=== step {record['step']} ===\n{record['sample']}\n" for record in records if "sample" in record]
    try:
        curves(records, directory / "curves.png", directory.name, diagnose(records, config).headline)
        reliability(calibration, directory / "reliability.png", directory.name)
        (directory / "samples.txt").write_text("\n".join(samples))
    except OSError as problem:
        say(f"no pictures this time: {problem}")


def results_of(records: list[dict[str, Any]], best: dict[str, Any] | None, test: dict[str, float]) -> dict[str, Any]:
    """What the summary keeps of a run: best and final validation, the test, the speed."""
    results: dict[str, Any] = {f"test/{name}": value for name, value in test.items()}
    if best is not None:
        results |= {f"best/{name}": value for name, value in best.items()}
    for name in ("val/loss", "val/bits_per_byte", "gap/loss", "train/loss"):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            results[f"final/{name}"] = values[-1]
    speeds = sorted(record["train/tokens_per_second"] for record in records if "train/tokens_per_second" in record)
    if speeds:
        results["tokens_per_second"] = speeds[len(speeds) // 2]
    return results


def tell_start(
    directory: Path, step: int, corpus: Path, tokens: int, length: str, config: Config, hardware: dict[str, Any]
) -> None:
    """What is about to be trained, on what, for how long."""
    print(f"run        {directory}" + (f" goes on from step {step}" if step else ""))
    print(f"corpus     {corpus}, {tokens:,} training tokens")
    print(f"length     {length}")
    if config.training.deterministic == "strict":
        print(f"strict     the gradients of {config.training.micro_batches} micro-batches are added in one fixed order")
    print(f"model      {config.model.family}, {read_summary(directory)['parameters']:,} parameters")
    print(f"hardware   {', '.join(f'{key} {value}' for key, value in hardware.items())}")
    if hardware["compile"]:
        print("compile    the first step takes half a minute, and some seconds when the run is started again")
    sys.stdout.flush()


def tell_results(directory: Path, config: Config, summary: dict[str, Any], again: bool) -> None:
    """What a person wants to know when a run is over; ``again``: it was over before it was started this time."""
    status = summary["status"]
    steps = f"{summary['steps']} of {summary['total_steps']} steps"
    if again:
        print(f"\nThis run is finished already ({steps}); nothing was done. --run.resume=never starts it afresh.")
    elif status == "preempted":
        print(f"\nStopped after {steps}, as asked. The same command goes on from here.")
    elif summary.get("stopped_early"):
        print(f"\nStopped early after {steps}: val had stopped improving.")
        print(f"The best weights, of step {summary['best/step']}, are what is tested, loaded and exported.")
    else:
        print(f"\n{status.capitalize()} after {steps}.")
    if "best/val/loss" in summary and status != "preempted":
        records = read_metrics(directory)
        samples = [record["sample"] for record in records if "sample" in record]
        if samples:
            print("\n".join(["", "sample", *(f"  | {line}" for line in samples[-1].splitlines())]))
        print(
            f"\nbest val loss     {summary['best/val/loss']:.4f} nats per token, "
            f"{summary['best/val/bits_per_byte']:.4f} bits per byte, at step {summary['best/step']}"
        )
        if "test/loss" in summary:
            print(
                f"test loss         {summary['test/loss']:.4f} nats per token, "
                f"{summary['test/bits_per_byte']:.4f} bits per byte (the best checkpoint)"
            )
        if summary.get("sparsity"):
            shares = summary["sparsity"].values()
            print(f"sparsity          {sum(shares) / len(shares):.1%} of a decayed tensor's weights are near zero")
        print(f"tokens per second {summary['tokens_per_second']:,.0f}")
        print(diagnose(records, config).text())
    print(f"run directory     {directory}")
    if (directory / "curves.png").exists():
        print(f"curves            {directory / 'curves.png'}")
    sys.stdout.flush()
