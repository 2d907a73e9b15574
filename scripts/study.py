"""Run a study: many points on many seeds from one short YAML file, with a report that says what helps.

python -m scripts.study run configs/studies/quick/dropout_x_weight_decay.yaml
python -m scripts.study plan configs/studies/quick/dropout_x_weight_decay.yaml --pilot 2
python -m scripts.study status configs/studies/quick/dropout_x_weight_decay.yaml

Interrupted in any way, the same command goes on. Started several times, on one machine or, with a postgresql storage
and a shared directory, on many, the copies share the work.
"""

from __future__ import annotations

import argparse
import math

from config import BadInput
from program import FINISHED, PREEMPTED, run
from studies.results import is_finished
from studies.space import PILOT_SEEDS, SCALE_SEEDS, Study, read_study

ACTIONS = {
    "run": "train what is not finished, then write the report",
    "status": "what is finished, running, failed and waiting",
    "report": "write the report of what is finished",
    "plan": "before the runs: a pilot, the power, the cost, and a registration of what the study is to be",
    "card": "what was asked and found, and how sure, as JSON",
    "scale": "what the winner is worth in text: it and the baseline on several amounts of it",
    "sweep": "print the study as a W&B sweep, for those who prefer its agents",
}


def command_line() -> argparse.ArgumentParser:
    """The actions and their options."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scripts.study", description=__doc__, formatter_class=plain)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, what in ACTIONS.items():
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("study", metavar="STUDY.yaml", help="a study file; configs/studies has examples")
        if name == "plan":
            action.add_argument("--pilot", type=pairs, default=2, metavar="N", help="pilot pairs; 0: register only")
            action.add_argument(
                "--point", metavar="NAME", help="what the pilot compares with the baseline; else the last"
            )
            action.add_argument("--effects", type=numbers, metavar="X,Y", help="true gains whose power is shown")
        if name in ("run", "plan", "scale"):
            how = "runs at a time on this machine; instead of what the study file says"
            action.add_argument("--workers", metavar="N", help=how)
    return parser


def main(arguments: list[str]) -> int:
    """Do what is asked with the study."""
    options = command_line().parse_args(arguments)
    study = read_study(options.study, workers=getattr(options, "workers", None))

    if options.action == "sweep":
        from studies.sweep import sweep_yaml

        print(sweep_yaml(study), end="")
        return FINISHED
    if options.action in ("plan", "card", "scale"):
        return beside(study, options)
    if options.action == "status":
        from studies.status import status_lines

        print("\n".join(status_lines(study)))
        return FINISHED
    code = FINISHED
    if options.action == "run":
        from studies.runner import run_study

        code = run_study(study)
    if not any(is_finished(path) for path in study.directory.glob("*-seed*")):
        words = f"no run of study {study.name} is finished in {study.directory}"
        if options.action == "report":
            raise BadInput(f"{words}; start it: python -m scripts.study run {options.study}")
        return code  # why is told already
    if code != PREEMPTED:
        from studies.report import write_report

        path, lines = write_report(study)
        print("\n".join(["", *lines, "", f"report            {path}"]))
    return code


def beside(study: Study, options: argparse.Namespace) -> int:
    """What goes before a study's runs and after them."""
    if options.action == "scale":
        from studies.scale import scale

        return scale(study)
    from studies.plan import card, plan

    if options.action == "plan":
        return plan(study, options.pilot, options.point, options.effects)
    print(card(study))
    return FINISHED


def numbers(text: str) -> list[float]:
    """Positive numbers with commas between them."""
    found = [float(part) for part in text.split(",")]
    if not all(0 < number < math.inf for number in found):
        raise ValueError
    return found


def pairs(text: str) -> int:
    """A number of pilot pairs."""
    count = int(text)
    if not 0 <= count <= SCALE_SEEDS - PILOT_SEEDS:
        raise ValueError
    return count


if __name__ == "__main__":
    run(main)
