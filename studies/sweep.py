"""A study as a W&B sweep: the same runs, handed out by W&B's server to its agents."""

from __future__ import annotations

from typing import Any

import yaml

from config import BadInput
from studies.knobs import whole
from studies.space import Range, Study
from studies.worker import text, torchrun


def sweep_yaml(study: Study) -> str:
    """The sweep's YAML for `wandb sweep`. Raises BadInput for a list of points, which a sweep cannot express."""
    if study.search == "list":
        raise BadInput(
            f"study {study.name} lists its points, and a W&B sweep has only combinations of values; "
            "write the space as a grid, or let the study run itself: its runs are tracked in W&B as one group"
        )
    study.points()  # all mistakes
    parameters: dict[str, dict[str, Any]] = {"run.seed": {"values": study.seeds}}
    for knob, side in study.ranges().items():
        parameters[knob] = distribution(knob, side) if isinstance(side, Range) else {"values": side}
    base = [f"--{knob}={text(value)}" for knob, value in study.base_draft.values.items() if knob not in parameters]
    files = [study.base] if isinstance(study.base, str) else study.base if isinstance(study.base, list) else base
    group = f"--tracking.group={study.name}"
    launcher = torchrun(study.processes) if study.processes > 1 else []
    sweep: dict[str, Any] = {
        "name": study.name,
        "program": "train.py",
        "method": "bayes" if study.search == "tpe" else "grid",
        "metric": {"name": study.metric.removeprefix("best "), "goal": "minimize" if study.minimize else "maximize"},
        "parameters": parameters,
        "command": ["${env}", "${interpreter}", *launcher, "${program}", *files, group, "${args}"],
    }
    if study.search == "tpe":
        sweep["run_cap"] = (study.trials or 1) * len(study.seeds)
    return yaml.safe_dump(sweep, sort_keys=False, allow_unicode=True)


def distribution(knob: str, side: Range) -> dict[str, Any]:
    """A range in W&B's words."""
    if whole(knob):
        return {"distribution": "q_log_uniform_values" if side.log else "int_uniform"} | {
            "min": int(side.min),
            "max": int(side.max),
        }
    return {"distribution": "log_uniform_values" if side.log else "uniform", "min": side.min, "max": side.max}
