"""What the average of a point's seeds is worth: their probabilities averaged, on the validation text."""

from __future__ import annotations

import json
from typing import Any

from config import BadInput
from files import write_json
from program import import_torch, warn
from studies.findings import Findings


def read_ensembles(findings: Findings) -> dict[str, dict[str, Any]]:
    """Point -> ``seeds``, ``loss`` of their mean probability, ``members`` (the mean of their own losses).

    Those in ensembles.json whose runs are the point's finished runs of the search today; others are out of date.
    """
    try:
        held = json.loads((findings.study.directory / "ensembles.json").read_text(encoding="utf-8"))
        return {name: one for name, one in held.items() if one["seeds"] == seeds_of(findings).get(name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_ensembles(findings: Findings) -> None:
    """Evaluate the ensemble of each point that has two finished seeds or more, where that was not done yet."""
    import_torch()
    from evaluation.ensemble import evaluate_listed
    from hardware import resolve
    from tracking.load_run import list_members, load_corpus

    study, known = findings.study, read_ensembles(findings)
    points = {point.name: point for point in findings.points}
    for name, seeds in seeds_of(findings).items():
        if name in known:
            continue
        runs = [study.run_directory(points[name], seed) for seed in seeds]
        hardware = resolve(study.config(points[name], seeds[0]).run)
        try:
            listed = list_members([str(run) for run in runs])
            scores = evaluate_listed(listed, hardware, load_corpus(runs[0]), ["val"])["val"]
        except BadInput as problem:
            warn(f"no ensemble of {name}: {problem}")
            continue
        members = sum(scores.members) / len(scores.members)
        known[name] = {"seeds": seeds, "loss": scores.after[-1]["loss"], "members": members}
        print(f"{name}: the mean of {len(seeds)} seeds has val/loss {known[name]['loss']:.4f}", flush=True)
        write_json(study.directory / "ensembles.json", known)


def seeds_of(findings: Findings) -> dict[str, list[int]]:
    """Point -> its seeds of the search that are finished, of points that have two or more."""
    seeds = {point.name: [run.seed for run in findings.of(point)] for point in findings.points}
    return {name: held for name, held in seeds.items() if len(held) > 1}


def sentence(findings: Findings, ensembles: dict[str, dict[str, Any]]) -> str:
    """What averaging brings the winner and the baseline; empty where it was not evaluated."""
    both = [point and ensembles.get(point.name) for point in (findings.winner, findings.points[0])]
    mine, its = both
    if not mine or not its or len(mine["seeds"]) != len(its["seeds"]):
        return ""
    left = its["loss"] - mine["loss"]
    way = f"{left:.4f} better than" if left > 0 else f"{-left:.4f} worse than"
    return (
        f"Averaged as probabilities, the {len(mine['seeds'])} seeds of the winner gain "
        f"{mine['members'] - mine['loss']:.4f} nats per token over one of them, those of the baseline "
        f"{its['members'] - its['loss']:.4f}; as ensembles the winner is {way} the baseline. This claims nothing."
    )
