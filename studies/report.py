"""The report of a study: report.html for people, results.csv and ranking.csv for programs, pictures for talks.

The page is one file that asks nobody for anything: its style is inline and its pictures are data inside it, drawn
twice, wide for a desk and narrow for a phone.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

import pictures
from config import Config
from files import write_text
from studies.findings import Findings, answer, cautions, chance, find, number, short
from studies.results import Result, collect, write_results, write_table
from studies.space import Point, Study
from studies.statistics import mean, seeds_needed
from studies.tracking import log_summary

SHOWN_CURVES = 3  # points that get a colour, besides the baseline and the worst
NOT_OF_A_POINT = ("run.", "tracking.", "checkpoint.")  # sections that say nothing about what a point is


def write_report(study: Study, points: Sequence[Point] | None = None) -> tuple[Path, list[str]]:
    """Write the report of what has run so far into the study's directory; returns its path and the answer's lines.

    ``points``: those of a search that makes them up as it goes, the baseline first; else ``study.points()``. Raises
    BadInput when no run is finished.
    """
    findings = find(study, collect(study, points))
    directory = study.directory
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


def averages(findings: Findings, point: Point, name: str) -> float | None:
    """Mean of a metric over the search's runs of a point that count."""
    values = [value for result in findings.of(point) if (value := result.number(name)) is not None]
    return mean(values) if values else None


def slowness(findings: Findings, point: Point) -> float | None:
    """Seconds per step relative to the baseline's; processes that shared the machine are in it."""
    mine, its = (averages(findings, which, "seconds_per_step") for which in (point, findings.points[0]))
    return mine / its if mine and its else None


def ranking_rows(findings: Findings) -> list[dict[str, Any]]:
    """The rows of ranking.csv, the best point first; differences are point minus baseline."""
    rows = []
    for rank, point in enumerate(findings.ranked(), 1):
        effect = findings.effect(point)
        runs = [result for result in findings.results if result.point.name == point.name and not result.confirmation]
        row: dict[str, Any] = {"rank": rank, "point": point.name, "seeds": len(findings.of(point))}
        row["failed"] = sum(result.status == "failed" for result in runs)
        row["mean"] = mean([result.value or 0.0 for result in findings.of(point)]) if findings.of(point) else None
        for name in ("difference", "low", "high", "p", "adjusted_p", "error", "degrees", "pooled"):
            row[name] = getattr(effect, name) if effect else None
        row["difference_bits_per_byte"] = effect.difference * findings.bits if effect and findings.bits else None
        row |= {name: averages(findings, point, name) for name in ("test/loss", "val/ece", "val/brier", "gap/loss")}
        rows.append(row | {"relative_seconds_per_step": slowness(findings, point)})
    return rows


# ---------------------------------------------------------------------------------------------- pictures

Picture = dict[str, Any]  # "title", "text", "alt", and the figures "wide" and "narrow"


def draw(findings: Findings) -> dict[str, Picture]:
    """The pictures that this study has something for, by file name."""
    drawn: dict[str, Picture] = {}

    def add(name: str, title: str, alt: str, text: str, figure: Callable[[bool], Any]) -> None:
        drawn[name] = {"title": title, "alt": alt, "text": text, "wide": figure(False), "narrow": figure(True)}

    ranked = [point for point in findings.ranked() if point.baseline or findings.effect(point)]
    rows = forest_rows(findings, ranked)
    if rows:
        text = "Points left of the line end lower than the baseline." if findings.study.minimize else ""
        alt = "Each point's difference to the baseline with its interval, the best first; the table below has it too"
        add("ranking", "Ranking", alt, text, lambda narrow: pictures.ranking(rows, findings.unit, narrow))
    heat = heat_cells(findings)
    if heat:
        add(
            "heatmap", "The two knobs together", f"Difference to the baseline over {' and '.join(heat[2])}",
            "Each cell is a point; blue ends lower than the baseline, bold is distinguishable from noise.",
            lambda narrow: pictures.heatmap(*heat, findings.unit, narrow),
        )  # fmt: skip
    doses = dose_rows(findings)
    if doses:
        add(
            "dose_response", "One knob at a time", f"Difference to the baseline over {', '.join(doses)}",
            "Points that differ from the baseline in this knob alone; the black dot is the baseline.",
            lambda narrow: pictures.dose_response(doses, findings.unit, narrow),
        )  # fmt: skip
    curves = curve_rows(findings, ranked)
    if curves:
        add(
            "curves", "Curves", "Validation and training loss over the steps, the best points and the baseline",
            "Lines are means over seeds, bands reach from the lowest to the highest seed.",
            lambda narrow: pictures.study_curves(curves, "nats per token", narrow),
        )  # fmt: skip
    names = [short(point.name) for point in ranked]
    first = next((place for place, point in enumerate(ranked) if point.baseline), None)
    for name, title, text, measures in (
        ("calibration", "Calibration", "How far the model's confidence is from how often it is right (ECE), and the "
         "squared error of its probabilities (Brier), on validation; lower is better for both.",
         {"expected calibration error": "val/ece", "Brier score": "val/brier"}),
        ("gap_and_cost", "Gap and cost", "The gap is validation minus training loss, both in evaluation mode: what is "
         "memorized rather than learnt. Cost is the time per step on whatever the runs shared the machine with.",
         {"gap: val − train, nats": "gap/loss", "seconds per step": "seconds_per_step"}),
    ):  # fmt: skip
        panels = {label: seed_values(findings, ranked, metric) for label, metric in measures.items()}
        panels = {label: values for label, values in panels.items() if any(values)}
        if panels:
            alt = f"{' and '.join(panels)} of each point, the baseline marked by a line"
            add(name, title, alt, text, lambda narrow, panels=panels: pictures.dots(names, panels, first, narrow))  # type: ignore[misc]
    return drawn


def seed_values(findings: Findings, ranked: list[Point], name: str) -> list[list[float]]:
    """A metric of each point's runs that count."""
    held = [[result.number(name) for result in findings.of(point)] for point in ranked]
    return [[value for value in values if value is not None] for values in held]


def forest_rows(findings: Findings, ranked: list[Point]) -> list[dict[str, Any]]:
    """What pictures.ranking draws; the baseline has no row, it is the line."""
    rows = []
    for point in ranked:
        effect = findings.effect(point)
        if effect is None:
            continue
        role = "uneven" if not effect.pooled else "winner" if point == findings.winner else "point"
        better = findings.better(effect) if effect.claimed else None
        row = {"label": short(point.name), "role": role, "better": better, "difference": effect.difference}
        rows.append(row | {"low": effect.low, "high": effect.high})
    return rows


def curve_rows(findings: Findings, ranked: list[Point]) -> list[dict[str, Any]]:
    """What pictures.study_curves draws: the best few, the baseline, the worst, and the rest faint."""
    others = [point for point in ranked if not point.baseline]
    roles = {point.name: "rest" for point in others} | {point.name: "baseline" for point in ranked if point.baseline}
    even = [point for point in others if point.name not in findings.search.uneven]
    if len(even) > SHOWN_CURVES:
        roles[even[-1].name] = "worst"
    roles |= {point.name: "best" for point in others[:SHOWN_CURVES]}
    rows = []
    for point in ranked:
        val, train = [], []
        for result in findings.of(point):
            averaged = any("val_average/loss" in record for record in result.records)
            val.append(pictures.column(result.records, "val_average/loss" if averaged else "val/loss"))
            both = [r for r in result.records if r.get("val/loss") is not None and r.get("gap/loss") is not None]
            train.append(([r["step"] for r in both], [r["val/loss"] - r["gap/loss"] for r in both]))
        rows.append({"label": short(point.name), "role": roles[point.name], "val": val, "train": train})
    return rows if any(steps for row in rows for steps, _ in row["val"]) else []


def settings(findings: Findings) -> dict[str, dict[str, Any]]:
    """Point → the knobs in which any two points differ → value, in the order of config.py."""
    study = findings.study
    flat = {point.name: study.config(point, study.seeds[0]).flat() for point in findings.points}
    first = flat[findings.points[0].name]
    differing = [
        knob
        for knob in first
        if not knob.startswith(NOT_OF_A_POINT) and any(values[knob] != first[knob] for values in flat.values())
    ]
    return {name: {knob: values[knob] for knob in differing} for name, values in flat.items()}


def heat_cells(findings: Findings) -> tuple[Any, Any, tuple[str, str], tuple[list[str], list[str]]] | None:
    """The cells of a study of two knobs, None for any other or when a fifth of the cells is empty."""
    chosen = settings(findings)
    knobs = list(next(iter(chosen.values())))
    if len(knobs) != 2:
        return None
    sides: list[list[Any]] = []
    for knob in knobs:
        values = list({repr(values[knob]): values[knob] for values in chosen.values()}.values())
        sides.append(
            sorted(values, key=lambda value: (not is_number(value), value if is_number(value) else str(value)))
        )
    by_cell = {tuple(map(repr, values.values())): name for name, values in chosen.items()}
    places = {point.name: point for point in findings.points}
    if 5 * len(by_cell) < 4 * len(sides[0]) * len(sides[1]) or min(map(len, sides)) < 2:
        return None
    differences, sure = [], []
    for one in sides[0]:
        names = [by_cell.get((repr(one), repr(other))) for other in sides[1]]
        effects = [findings.effect(places[name]) if name else None for name in names]
        zero = [0.0 if name and places[name].baseline else None for name in names]
        cells = zip(effects, zero, strict=True)
        differences.append([effect.difference if effect else base for effect, base in cells])
        sure.append([bool(effect and effect.claimed) for effect in effects])
    if not any(cell for row in differences for cell in row):
        return None
    labels = tuple([str(value) if not is_number(value) else f"{value:g}" for value in side] for side in sides)
    return differences, sure, (short(knobs[0]), short(knobs[1])), (labels[0], labels[1])


def dose_rows(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """For each knob with at least three numeric values: the points that differ from the baseline in it alone."""
    chosen = settings(findings)
    base = chosen[findings.points[0].name]
    doses: dict[str, list[dict[str, Any]]] = {}
    for point in findings.points:
        effect = findings.effect(point)
        differing = [knob for knob, value in chosen[point.name].items() if value != base[knob]]
        if effect and effect.pooled and len(differing) == 1 and is_number(chosen[point.name][differing[0]]):
            dose = {"value": chosen[point.name][differing[0]], "difference": effect.difference, "baseline": False}
            doses.setdefault(differing[0], []).append(dose | {"low": effect.low, "high": effect.high})
    for knob, rows in doses.items():
        if is_number(base[knob]):
            rows.append({"value": base[knob], "difference": 0.0, "low": None, "high": None, "baseline": True})
    return {short(knob): rows for knob, rows in doses.items() if len(rows) >= 3}


def is_number(value: Any) -> bool:
    """Whether the value has a place on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------- the page


def render(findings: Findings, drawn: dict[str, Picture]) -> str:
    """The page's HTML; everything that comes from names, errors and configs is escaped."""
    study, search = findings.study, findings.search
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "short": short, "chance": chance, "quote": quote, "figure": figure_html}
    pair = [findings.points[0], findings.winner] if findings.winner else []
    fresh = bool(findings.winner and findings.of(findings.winner, True) and findings.of(findings.points[0], True))
    best = findings.effect(findings.winner) if findings.winner else None
    sizes: dict[str, float] = {}
    if search.noise.sd and search.smallest is not None and best is not None:
        sizes = {"the best point's, as seen": abs(best.difference), "the noise of one run": search.noise.sd}
        sizes["half that noise"] = search.noise.sd / 2
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        study=study,
        search=search,
        sentences=answer(findings),
        cautions=cautions(findings),
        drawn=drawn,
        rows=[row | {"effect": search.effects.get(row["point"])} for row in ranking_rows(findings)],
        pair=pair,
        fresh=fresh,
        pair_means={
            (point.name, metric): mean(values) if values else None
            for point in pair
            for metric in ("metric", "test/loss")
            for values in [pair_values(findings, point, metric, fresh)]
        },
        seeds_for={
            what: (size, seeds_needed(size, search.noise.sd or 0.0, max(1, len(search.effects))))
            for what, size in sizes.items()
        },
        made=sorted({origin(result) for result in findings.results if result.value is not None}),
        finished=sum(result.value is not None for result in findings.results),
        unfinished=[result for result in findings.results if result.reason],
        now=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        base=description(study.config(findings.points[0], study.seeds[0])),
    )


def pair_values(findings: Findings, point: Point, metric: str, confirmation: bool) -> list[float]:
    """The study's metric ("metric") or another of a point's runs, of the confirmation or of the search."""
    runs = findings.of(point, confirmation)
    values = [result.value if metric == "metric" else result.number(metric) for result in runs]
    return [value for value in values if value is not None]


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
        pairs = known.items() if isinstance(known, dict) else []
        words.append(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in pairs) or f"unknown {part}")
    return "; ".join(words)


def description(config: Config) -> str:
    """What all runs share, in a line."""
    model, corpus = config.model, config.data.path or config.data.corpus
    return f"{model.family}, {model.n_layers} layers of width {model.d_model}, trained on {corpus}"
