"""The study's own run in W&B: ranking and pictures, in the group of its runs. Never fatal, as in tracking.metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from program import warn
from studies.findings import Findings
from studies.space import Study
from tracking.weights_and_biases import start_wandb, wandb_mode


def log_summary(
    study: Study, findings: Findings, ranking: list[dict[str, Any]], pictures: dict[str, Path], sentences: list[str]
) -> None:
    """One run of job type "report" in the study's group, with the answer, the ranking as a table, and the pictures.

    Goes online, offline or nowhere as tracking.wandb of the study's base says. A study reported again goes on in the
    same W&B run.
    """
    config = study.config(findings.points[0], study.seeds[0])
    tracking = config.tracking.model_copy(update={"group": study.name, "tags": ["report"]})
    config = config.model_copy(update={"tracking": tracking})
    if wandb_mode(config) == "disabled":
        return
    run = start_wandb(study.directory, config, job_type="report")
    if run is None:
        return
    try:
        import wandb

        columns: list[str | int] = list(ranking[0])
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in ranking])
        run.log({"table": table} | {f"pictures/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
        decision = findings.decision
        told = {"answer": " ".join(sentences), "winner": decision.point, "claim": decision.claim}
        run.summary.update(told | {name: getattr(decision, name) for name in ("difference", "low", "high", "p")})
        run.finish()
    except Exception as problem:  # whatever a dead or unreachable W&B raises must not lose a report
        warn(f"W&B did not take the report ({problem}); it is whole in {study.directory}")
