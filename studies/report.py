"""The report of a study: report.html for people, results.csv and ranking.csv for programs, pictures for talks.

The page is one file that asks nobody for anything: its style is inline and its pictures are data inside it, drawn
twice, wide for a desk and narrow for a phone.
"""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

import pictures
from files import write_text
from studies.decision import Values, judge_pairs, paired
from studies.ensembles import read_ensembles, sentence, write_ensembles
from studies.findings import Findings, answer, cautions, find, is_number, settings, short
from studies.results import Result, write_results, write_table
from studies.space import Point, Study
from studies.tracking import log_summary

SHOWN_CURVES = 3  # points that get a colour, besides the baseline and the worst
CHOSEN = "where it was chosen"


def write_report(study: Study, ensembles: bool = False) -> tuple[Path, list[str]]:
    """Write the report of what has run so far into the study's directory; returns its path and the answer's lines.

    ``ensembles``: also evaluate the mean of each point's seeds. Raises BadInput when no run is finished.
    """
    findings = find(study)
    directory = study.directory
    if ensembles:
        write_ensembles(findings)
    write_results(directory / "results.csv", study, findings.results)
    ranking = ranking_rows(findings)
    write_table(directory / "ranking.csv", ranking)
    drawn = draw(findings)
    for name, picture in drawn.items():
        pictures.save(picture["wide"], directory / f"{name}.png")
    write_text(directory / "report.html", render(findings, drawn))
    sentences = answer(findings)
    log_summary(study, findings, ranking, {name: directory / f"{name}.png" for name in drawn}, sentences)
    return directory / "report.html", sentences + [f"note: {line}" for line in cautions(findings)]


# ---------------------------------------------------------------------------------------------- numbers


def compared(findings: Findings) -> list[Point]:
    """The baseline, then the points that can be compared with it, the best first."""
    by_name = {point.name: point for point in findings.points}
    return [findings.points[0], *(by_name[row.point] for row in findings.rows)]


def leads(findings: Findings) -> bool:
    """Whether the point told of did better than the baseline where it was chosen."""
    chosen = findings.decision.search
    return chosen is not None and findings.better(chosen.mean)


def numbers(findings: Findings, point: Point, name: str) -> list[float]:
    """A metric of the search's runs of a point that count."""
    return [value for run in findings.of(point) if (value := run.number(name)) is not None]


def ranking_rows(findings: Findings) -> list[dict[str, Any]]:
    """The rows of ranking.csv: the baseline, then the points, the best first; differences are point minus baseline."""
    order, values, rows = compared(findings), findings.design.search(), []

    def average(point: Point, name: str) -> float | None:
        return fmean(known) if (known := numbers(findings, point, name)) else None

    for place, point in enumerate(order + [point for point in findings.points if point not in order]):
        runs, difference = findings.of(point), findings.row(point)
        row: dict[str, Any] = {"rank": place if difference and difference.may_win else None, "point": point.name}
        row["seeds"] = len(runs)
        row["failed"] = sum(not math.isfinite(value) for value in values[point.name].values())
        row["mean"] = fmean(run.value or 0.0 for run in runs) if runs else None
        row["difference"] = difference.mean if difference else None
        row["spread"] = difference.sd if difference else None
        row["unchanged"] = bool(difference and difference.unchanged)
        row["difference_bits_per_byte"] = difference.mean * findings.bits if difference and findings.bits else None
        row |= {name: average(point, name) for name in ("test/loss", "val/ece", "val/brier", "gap/loss")}
        mine, its = (average(which, "seconds_per_step") for which in (point, order[0]))
        rows.append(row | {"relative_seconds_per_step": mine / its if mine and its else None})
    return rows


def pairs(findings: Findings) -> dict[str, list[tuple[float, float]]]:
    """Value of the baseline and of the winner on each seed of both, on fresh seeds and on those where it was chosen."""
    known, point = findings.design, findings.decision.point

    def both(values: Values) -> list[tuple[float, float]]:
        its, mine = values.get(known.baseline.name, {}), values.get(point or "", {})
        return [(its[seed], mine[seed]) for seed in its if math.isfinite(its[seed] - mine.get(seed, math.nan))]

    groups = {"fresh seeds": both(known.fresh()), CHOSEN: both(known.contest())}
    return {title: held for title, held in groups.items() if held}


def fresh_runs(findings: Findings) -> list[tuple[Result, Result]]:
    """The runs of the baseline and of the winner on each fresh seed, once all are over."""
    known = findings.design
    seeds = findings.study.fresh_seeds if known.fresh() else []
    return [(known.result(known.baseline, seed), known.result(known.winner, seed)) for seed in seeds if known.winner]


def tuning_rows(findings: Findings) -> list[dict[str, Any]]:
    """Each contender's mean at each multiple of the learning rate that was tried; None: a run failed."""
    study, known = findings.study, findings.design
    rows = []
    for point in [known.points[0], *known.finalists] if known.tried else []:
        tuned = [study.tuned(point, multiple) for multiple in known.tried]
        held = known.values(tuned, study.tuning_seeds)
        means = [fmean(held[one.name].values()) for one in tuned]
        finite = [mean if math.isfinite(mean) else None for mean in means]
        rows.append({"point": point.name, "means": finite, "chosen": known.chosen.get(point.name)})
    return rows


# ---------------------------------------------------------------------------------------------- pictures

Picture = dict[str, Any]  # "alt", and the figures "wide" and "narrow"
Plan = tuple[str, str, Callable[..., Any]]  # file name, alt, and what draws it


def draw(findings: Findings) -> dict[str, Picture]:
    """The pictures that this study has something for, by file name."""
    return {
        name: {"alt": alt, "wide": figure(narrow=False), "narrow": figure(narrow=True)}
        for name, alt, figure in (*pictures_of_pair(findings), *pictures_of_points(findings))
    }


def pictures_of_pair(findings: Findings) -> Iterator[Plan]:
    """What is known of the winner, or of the point that came nearest."""
    titled = {}
    for title, held in pairs(findings).items():
        better = sum(findings.better(mine - its) for its, mine in held)
        titled[f"{title}:\nbetter on {better} of {len(held)}"] = held
    if titled:
        sides = "baseline", "winner" if leads(findings) else "nearest"
        alt = f"A line a seed from the baseline to the {sides[1]}; {'; '.join(titled)}".replace("\n", " ")
        yield "winner", alt, partial(pictures.slopes, titled, sides, findings.unit, findings.study.minimize)
    if rows := interval_rows(findings):
        alt = "The difference on fresh seeds with its interval, beside the one where the winner was chosen"
        yield "confirmed", alt, partial(pictures.intervals, rows, findings.unit)


def pictures_of_points(findings: Findings) -> Iterator[Plan]:
    """What the search saw of all points."""
    unit, points = findings.unit, compared(findings)
    winner = points.index(findings.winner) if findings.winner and leads(findings) else None
    rows = partial(pictures.dots, [short(point.name) for point in points], baseline=0, winner=winner)
    if len(points) > 1:
        held = [[0.0], *(differences(findings, point) for point in points[1:])]
        alt = "Each point's difference to the baseline on each seed, the best first; the table below has the means"
        yield "search", alt, partial(rows, {f"difference to the baseline, {unit}": held})
    if heat := heat_cells(findings):
        yield (
            "heatmap",
            f"Difference to the baseline over {' and '.join(heat[1])}",
            partial(pictures.heatmap, *heat, unit),
        )
    if doses := dose_rows(findings):
        alt = f"Difference to the baseline over {', '.join(doses)}"
        yield "dose_response", alt, partial(pictures.dose_response, doses, unit)
    if curves := curve_rows(findings, points):
        alt = "Validation and training loss over the steps, the best points and the baseline"
        yield "curves", alt, partial(pictures.study_curves, curves, "nats per token")
    for name, measures in (
        ("calibration", {"expected calibration error": "val/ece", "Brier score": "val/brier"}),
        ("gap_and_cost", {"gap: val − train, nats": "gap/loss", "seconds per step": "seconds_per_step"}),
    ):
        panels = {label: [numbers(findings, point, metric) for point in points] for label, metric in measures.items()}
        panels = {label: values for label, values in panels.items() if any(values)}
        if panels:
            yield name, f"{' and '.join(panels)} of each point, the baseline marked by a line", partial(rows, panels)


def differences(findings: Findings, point: Point) -> list[float]:
    """The point minus the baseline on each seed of the search."""
    values = findings.design.search()
    return paired(values[point.name], values[findings.points[0].name])


def interval_rows(findings: Findings) -> list[dict[str, Any]]:
    """What pictures.intervals draws: what the fresh seeds say, and what the winner showed where it was chosen."""
    decision, known, winner = findings.decision, findings.design, findings.winner
    if decision.low is None or decision.point is None or winner is None:
        return []
    contest = known.contest()
    tuned = {"tuning": paired(contest[decision.point], contest[known.baseline.name])} if known.own else {}
    rows = [(f"fresh seeds: {decision.seeds}", decision, True)]
    for stage, held in (tuned | {"search": differences(findings, winner)}).items():
        rows.append((f"{CHOSEN}: {stage}, {len(held)} seeds", judge_pairs(held, [], decision.alpha), False))
    return [
        {"label": label, "difference": row.difference, "low": row.low, "high": row.high, "sure": sure}
        for label, row, sure in rows
        if row.difference is not None  # one seed has no interval to show
    ]


def curve_rows(findings: Findings, points: list[Point]) -> list[dict[str, Any]]:
    """What pictures.study_curves draws: the best few, the baseline, the worst, and the rest faint.

    They show the seeds that all points share, since a seed shifts a curve more than many a regularizer does.
    """
    roles = {point.name: "rest" for point in points} | {points[0].name: "baseline"}
    sound = [row for row in findings.rows if row.may_win]
    if len(sound) > SHOWN_CURVES:
        roles[max(sound, key=lambda row: findings.sign * row.mean).point] = "worst"
    roles |= {row.point: "best" for row in sound[:SHOWN_CURVES]}
    shared = set.intersection(*({run.seed for run in findings.of(point)} for point in points))
    rows = []
    for point in points:
        val, train = [], []
        for result in findings.of(point):
            if shared and result.seed not in shared:
                continue
            averaged = any("val_average/loss" in record for record in result.records)
            val.append(pictures.column(result.records, "val_average/loss" if averaged else "val/loss"))
            both = [r for r in result.records if r.get("val/loss") is not None and r.get("gap/loss") is not None]
            train.append(([r["step"] for r in both], [r["val/loss"] - r["gap/loss"] for r in both]))
        rows.append({"label": short(point.name), "role": roles[point.name], "val": val, "train": train})
    return rows if any(steps for row in rows for steps, _ in row["val"]) else []


def heat_cells(findings: Findings) -> tuple[Any, tuple[str, str], tuple[list[str], list[str]]] | None:
    """The cells of a study of two knobs, None for any other or when a fifth of the cells is empty."""
    chosen = settings(findings)
    knobs = list(next(iter(chosen.values())))
    if len(knobs) != 2:
        return None
    sides = [list({repr(values[knob]): values[knob] for values in chosen.values()}.values()) for knob in knobs]
    for side in sides:
        side.sort(key=lambda value: (not is_number(value), value if is_number(value) else str(value)))
    means = {row.point: row.mean for row in findings.rows} | {findings.points[0].name: 0.0}
    by_cell = {tuple(map(repr, values.values())): means[name] for name, values in chosen.items() if name in means}
    if 5 * len(by_cell) < 4 * len(sides[0]) * len(sides[1]) or min(map(len, sides)) < 2 or not any(by_cell.values()):
        return None
    cells = [[by_cell.get((repr(one), repr(other))) for other in sides[1]] for one in sides[0]]
    labels = tuple([str(value) if not is_number(value) else f"{value:g}" for value in side] for side in sides)
    return cells, (short(knobs[0]), short(knobs[1])), (labels[0], labels[1])


def dose_rows(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """For each knob with at least three numeric values: the points that differ from the baseline in it alone."""
    chosen = settings(findings)
    base = chosen[findings.points[0].name]
    doses: dict[str, list[dict[str, Any]]] = {}
    for point in compared(findings)[1:]:
        differing = [knob for knob, value in chosen[point.name].items() if value != base[knob]]
        if len(differing) == 1 and is_number(chosen[point.name][differing[0]]):
            held = differences(findings, point)
            dose = {"value": chosen[point.name][differing[0]], "difference": fmean(held), "seeds": held}
            doses.setdefault(differing[0], []).append(dose | {"baseline": False})
    for knob, rows in doses.items():
        if is_number(base[knob]):
            rows.append({"value": base[knob], "difference": 0.0, "seeds": [], "baseline": True})
    return {short(knob): rows for knob, rows in doses.items() if len(rows) >= 3}


# ---------------------------------------------------------------------------------------------- the page


def render(findings: Findings, drawn: dict[str, Picture]) -> str:
    """The page's HTML; everything that comes from names, errors and configs is escaped."""
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True)
    environment.filters |= {"shown": shown, "short": short, "quote": quote, "figure": figure_html}
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        study=findings.study,
        sentences=answer(findings),
        cautions=cautions(findings),
        drawn=drawn,
        rows=ranking_rows(findings),
        ensembles=(averaged := read_ensembles(findings)),
        averaged=sentence(findings, averaged),
        fresh=fresh_runs(findings),
        tuning=tuning_rows(findings),
        leading=leads(findings),
        made=sorted({origin(result) for result in findings.results if result.value is not None}),
        finished=sum(result.value is not None for result in findings.results),
        unfinished=[result for result in findings.results if result.reason],
        now=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        base=findings.study.config(findings.points[0], 0),
    )


def shown(value: float | None, form: str = "z.4f") -> str:
    """The number as a table has it."""
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def figure_html(picture: Picture) -> Markup:
    """A picture in both widths, as data inside the page."""
    sources = []
    for width in ("wide", "narrow"):
        drawing = pictures.svg(picture[width]).encode()
        sources.append(f"data:image/svg+xml;base64,{base64.b64encode(drawing).decode()}")
    return Markup(  # Markup.format escapes what it is given
        '<picture><source media="(max-width: 40rem)" srcset="{}"><img src="{}" alt="{}"></picture>'
    ).format(sources[1], sources[0], picture["alt"])


def origin(result: Result) -> str:
    """On what a run was made: versions, commit, hardware."""
    words = []
    for part in ("versions", "hardware"):
        known = result.summary.get(part)
        told = known.items() if isinstance(known, dict) else []
        words.append(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told) or f"unknown {part}")
    return "; ".join(words)
