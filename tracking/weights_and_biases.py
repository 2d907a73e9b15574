"""Weights & Biases mirrors metrics.jsonl. It may be unreachable, refuse, or die: one warning, and training goes on."""

from __future__ import annotations

import netrc
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import files
from config import Config
from program import warn

SECONDS_TO_WAIT = 7  # for the server, before going on without it


class Mirror:
    """The W&B run of a directory, if there is one."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics, without the sample of text."""
        if self.run is None:
            return
        try:
            self.run.log({key: value for key, value in record.items() if key != "sample"}, step=record["step"])
        except Exception as problem:  # whatever a dead or unreachable W&B raises must not fail a run
            warn(f"W&B stopped taking metrics ({problem}); metrics.jsonl has them all")
            self.run = None

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Close the W&B run, whose summary gets ``summary``."""
        if self.run is None:
            return
        try:
            self.run.summary.update(_flat(summary))
            self.run.finish(exit_code=exit_code)
            if self.run.offline:
                print(f"W&B, offline      to upload: wandb sync {self.run.settings.sync_dir}")
        except Exception as problem:  # as above
            warn(f"W&B did not take the summary ({problem}); metrics.jsonl is whole")


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


def start_wandb(directory: Path, config: Config, job_type: str | None = None) -> Any:
    """The W&B run of this directory, or None. Unreachable or refused: offline, at most 10 seconds later."""
    mode = wandb_mode(config)
    if mode not in ("online", "offline"):
        if mode != "disabled":
            warn(f"WANDB_MODE={mode} is none of online, offline, disabled; W&B is left out")
        return None
    import wandb

    # One id for one run directory, so that a resume goes on in the same W&B run.
    identity = directory / "wandb_id"
    if not identity.exists():
        files.write_text(identity, secrets.token_hex(4))
    settings = wandb.Settings(init_timeout=SECONDS_TO_WAIT, console="off", silent=True)
    attempts: list[Any] = [mode] if mode == "offline" else [mode, *["offline"] * 3]
    for number, attempt in enumerate(attempts, start=1):
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
            if number in (1, len(attempts)):
                warn(f"W&B {attempt} is not to be had ({first}); metrics.jsonl is written all the same")
            # Else the run's id stays taken, and the offline run after it is refused; it takes a moment to be free.
            wandb.teardown()
            time.sleep(0.5 * number)
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with dots in their keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
