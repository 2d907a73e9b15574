"""Run a study: many points on many seeds from one short YAML file, with a report that says what helps.

python -m scripts.study run configs/studies/quick/dropout_x_weight_decay.yaml
python -m scripts.study status configs/studies/quick/dropout_x_weight_decay.yaml

Interrupted in any way, the same command goes on. Started several times, on one machine or, with a postgresql storage
and a shared directory, on many, the copies share the work.
"""

from __future__ import annotations

import argparse

from config import BadInput
from program import FINISHED, PREEMPTED, run
from studies.results import is_finished
from studies.space import read_study

ACTIONS = {
    "run": "train what is not finished, then write the report",
    "status": "what is finished, running, failed and waiting",
    "report": "write the report of what is finished",
    "sweep": "print the study as a W&B sweep, for those who prefer its agents",
}


def main(arguments: list[str]) -> int:
    """Do what is asked with the study."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scripts.study", description=__doc__, formatter_class=plain)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, what in ACTIONS.items():
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("study", metavar="STUDY.yaml", help="a study file; configs/studies has examples")
        if name == "run":
            how = "runs at a time on this machine; instead of what the study file says"
            action.add_argument("--workers", metavar="N", help=how)
    options = parser.parse_args(arguments)
    study = read_study(options.study, workers=getattr(options, "workers", None))

    if options.action == "sweep":
        from studies.sweep import sweep_yaml

        print(sweep_yaml(study), end="")
        return FINISHED
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


if __name__ == "__main__":
    run(main)
