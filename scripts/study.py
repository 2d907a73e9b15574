"""Run a study: many points on many seeds from one short YAML file, with a report that says what helps.

python -m scripts.study run configs/studies/quick/dropout_x_weight_decay.yaml
python -m scripts.study status configs/studies/quick/dropout_x_weight_decay.yaml

Interrupted in any way, the same command goes on. Started several times, on one machine or, with a postgresql storage
and a shared directory, on many, the copies share the work.

Any two groups of finished runs can be judged, of a study or not:

python -m scripts.study judge 'runs/mine-seed*' --against 'runs/plain-seed*'
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line import default_text, doc_lines, type_text
from config import BadInput
from program import FINISHED, PREEMPTED, run
from studies.results import is_finished
from studies.space import EXAMPLES, PILOT_SEEDS, SCALE_SEEDS, Study, keys, read_study

ACTIONS = {
    "run": "train what is not finished, then write the report",
    "status": "what is finished, running, failed and waiting",
    "report": "write the report of what is finished",
    "plan": "before the runs: a pilot, the power, the cost, and a registration of what the study is to be",
    "card": "what was asked and found, and how sure, as JSON",
    "scale": "what the winner is worth in text: it and the baseline on several amounts of it",
    "sweep": "print the study as a W&B sweep, for those who prefer its agents",
}
JUDGE = """Say whether one group of runs is better than another, by how much and how sure, from runs of any origin.

python -m scripts.study judge 'runs/mine-seed*' --against 'runs/plain-seed*'
python -m scripts.study judge mine --against plain --table results.csv --metric val/bits_per_byte

Runs on the same seed are paired. Exit codes: 0 better, 11 worse, 10 undecided, 2 bad input (also groups that cannot
be compared). A group may grow and be judged again: such looks are recorded beside the runs, and each asks for more
than the one before, so that all together are wrong in at most 5%. The same numbers again are no new look.
"""


def command_line() -> argparse.ArgumentParser:
    """The actions and their options."""
    plain = argparse.RawDescriptionHelpFormatter
    words: dict[str, Any] = {"description": __doc__, "epilog": "\n".join(study_file())}
    parser = argparse.ArgumentParser("python -m scripts.study", formatter_class=plain, **words)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    instead = "instead of what the study file says"
    for name, what in ACTIONS.items():
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("study", metavar="STUDY.yaml", help="a study file; configs/studies has examples")
        if name == "plan":
            action.add_argument("--pilot", type=pairs, default=2, metavar="N", help="pilot pairs; 0: register only")
            which = "what the pilot compares with the baseline; else the last"
            action.add_argument("--point", metavar="NAME", help=which)
            action.add_argument("--effects", type=numbers, metavar="X,Y", help="true gains whose power is shown")
        if name == "report":
            what = "evaluate the mean probability of each point's seeds too, for a column and a sentence"
            action.add_argument("--ensembles", action="store_true", help=what)
        if name in ("run", "plan", "scale"):
            action.add_argument("--workers", metavar="N", help=f"runs at a time on this machine; {instead}")
        if name in ("run", "plan", "scale", "sweep"):
            action.add_argument("--processes", metavar="N", help=f"processes of each run, by torchrun; {instead}")
    add_judge(actions, plain)
    return parser


def study_file() -> list[str]:
    """Every key of a study file with its default and doc, and an example for each search."""
    lines = ["a study file:"]
    for name, field in keys().items():
        default = "" if field.is_required() else default_text(field)
        lines += [f"  {name}: {default}   ({type_text(field)})", *doc_lines(field)]
    for search, example in EXAMPLES.items():
        lines += ["", f"{search}, for example:", "", *(f"  {line}" for line in example.splitlines())]
    return lines


def main(arguments: list[str]) -> int:
    """Do what is asked."""
    options = command_line().parse_args(arguments)
    if options.action == "judge":
        return judge(options)
    changes = {name: getattr(options, name, None) for name in ("workers", "processes")}
    study = read_study(options.study, **changes)
    if options.action in ("run", "report"):
        return run_and_report(study, options)
    return beside(study, options)


def run_and_report(study: Study, options: argparse.Namespace) -> int:
    """The study's runs, if they are asked for, and its report."""
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

        path, lines = write_report(study, getattr(options, "ensembles", False))
        print("\n".join(["", *lines, "", f"report            {path}"]))
    return code


def beside(study: Study, options: argparse.Namespace) -> int:
    """What goes before a study's runs, beside them, and after them. Each imports what it needs alone."""
    if options.action == "plan":
        from studies.plan import plan

        return plan(study, options.pilot, options.point, options.effects)
    if options.action == "scale":
        from studies.scale import scale

        return scale(study)
    if options.action == "card":
        from studies.plan import card

        print(card(study))
    elif options.action == "status":
        from studies.status import status_lines

        print("\n".join(status_lines(study)))
    else:
        from studies.sweep import sweep_yaml

        print(sweep_yaml(study), end="")
    return FINISHED


def add_judge(actions: Any, plain: type[argparse.HelpFormatter]) -> None:
    """The words that ``judge`` takes."""
    what = "is one group of runs better than another? also for runs of no study"
    action = actions.add_parser("judge", help=what, description=JUDGE, formatter_class=plain)
    runs = "run directories or globs; with --table points"
    action.add_argument("runs", nargs="+", metavar="RUNS", help=runs)
    action.add_argument("--against", nargs="+", metavar="RUNS", required=True, help="those to compare with, likewise")
    metric = "what is compared, at the end of each run (default: val/loss); smaller is better, but for accuracy"
    action.add_argument("--metric", default="val/loss", help=metric)
    table = "take the values from a table with the columns point, seed, value (and status, if you like)"
    action.add_argument("--table", metavar="FILE.csv", help=table)
    unequal = "judge runs of unequal steps or tokens all the same, and say so"
    action.add_argument("--allow-unequal", action="store_true", help=unequal)
    record = "where looks are recorded (default: .looks.json beside the runs or the table). Give each comparison of "
    record += "equal configs, as of two versions of the code, its own"
    action.add_argument("--record", metavar="FILE", help=record)
    action.add_argument("--json", action="store_true", help="print one JSON object")


def judge(options: argparse.Namespace) -> int:
    """Print the verdict on two groups of runs; returns its exit code."""
    from studies import judge as referee

    case = referee.case_of(options.runs, options.against, options.metric, options.table, options.allow_unequal)
    case = replace(case, record=Path(options.record)) if options.record else case
    verdict, look = referee.judge(case)
    if options.json:
        print(json.dumps(referee.json_of(case, verdict, look)))
    else:
        print(referee.text_of(case, verdict, look))
    return referee.EXIT_CODES[verdict.word]


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
