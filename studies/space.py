"""The study file: which points are run on which seeds. Everything is checked before anything starts.

    name: dropout_x_weight_decay
    base: configs/repeated_data.yaml      # a config file, a list of them, or sections written here
    search: grid                          # grid, list or tpe
    space:                                # grid: knob -> values; list: a list of points; tpe: knob -> {min, max, log}
      weight_decay: [0.1, 1]              # a knob's short name will do where only one section has it
      residual_dropout: [0, 0.1]
    seeds: 4                              # of the best points in the search; the others get fewer
    baseline: {weight_decay: 0.1}         # what all is compared with; {}: the base as it is
    tune: {optimizer.lr: [0.5, 1, 2]}     # multiples tried for the best points and the baseline alike; null: none
    confirm_seeds: 8                      # fresh seeds, by which nothing is chosen, from which alone a gain is claimed

A point sets knobs on top of the base; studies/design.py says on which seeds it is run. Its runs lie in
runs/<study>/<point>-seed<k>/.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from command_line import Draft, load_yaml
from config import BadInput, Config, Section
from studies.knobs import LONGEST_NAME, full_names, name_of
from tracking.run_directory import read_config

BASELINE = "baseline"
SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "ece", "brier", "entropy", "log_z")
METRICS = (
    *(f"val/{name}" for name in SCORES),
    "gap/loss",
    "train/loss",
    *(f"best val/{name}" for name in SCORES),
)
# Each purpose has seeds of its own, so that no run serves two: those of the search are below FRESH_SEEDS.
FRESH_SEEDS, TUNING_SEEDS, PILOT_SEEDS, SCALE_SEEDS = 1000, 2000, 3000, 4000
N_TUNING_SEEDS = 2
# Knobs that change the text, or what a token sees of it, or the unit in which the metric is measured.
MEASURED_ON = {
    *(f"data.{name}" for name in ("corpus", "path", "subset", "source_split", "text_field", "document", "transform")),
    *(f"data.{name}" for name in ("max_documents", "split", "val_fraction", "test_fraction", "isolate_documents")),
    "evaluation.max_tokens",
}
UNITS = ("data.tokenizer", "data.vocab_size")
MOST_TRIED = 256  # combinations of a search's values that are checked beforehand
PLACE = "\0"  # stands for the point in a message until it is known which points share the mistake


@dataclass(frozen=True)
class Point:
    """What is compared: knobs by their full names, set on top of the base."""

    name: str
    knobs: dict[str, Any] = field(hash=False)
    origin: str | None = None  # of a variation (another learning rate, another amount of text): the point it is of

    @property
    def baseline(self) -> bool:
        """Whether it is what all others are compared with."""
        return self.name == BASELINE


class Range(Section):
    """Between which values the search chooses."""

    min: float
    max: float
    log: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} must be below max {self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"log needs a min above 0, not {self.min:g}")
        return self


class Scale(Section):
    """What ``study scale`` runs the winner and the baseline on."""

    train_tokens: list[Annotated[int, Field(ge=2)]] | None = Field(None, min_length=3)
    """Values of data.train_tokens. null: a quarter, half and all of the base's, and twice it if there is as much text.
    The base's own is always among them."""
    seeds: int = Field(3, ge=2, le=1000)
    """How many; an interval from three is three times as wide as one from eight."""
    widths: list[Annotated[int, Field(ge=1)]] = Field([])
    """Values of model.d_model, at the base's amount of text."""

    @field_validator("train_tokens", "widths")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value and (sorted(set(value)) != value or len(value) < 2):
            raise ValueError("must be at least two values, ascending")
        return value


EXAMPLES = {
    "grid": """\
name: dropout_x_weight_decay
base: configs/scarce_data.yaml
search: grid
space: {weight_decay: [0.1, 1], residual_dropout: [0, 0.1, 0.2]}
baseline: {weight_decay: 0.1}
""",
    "list": """\
name: three_ideas
base: [configs/scarce_data.yaml, mine.yaml]
search: list
space:
  - {weight_decay: 1}
  - {ema_decay: 0.999, name: averaged}
  - {label_smoothing: 0.1, model.d_model: 96}
seeds: 3
metric: best val/loss
""",
    "tpe": """\
name: how_much_dropout
base: {data: {tokenizer: byte}, model: {d_model: 64}, training: {max_steps: 400}}
search: tpe
space:
  residual_dropout: {min: 0, max: 0.5}
  weight_decay: {min: 0.01, max: 3, log: true}
  training.global_batch_size: [8, 16]
trials: 20
tune: null
""",
}


class Study(Section):
    """What a study file holds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Its directory under runs/, and the group of its runs in W&B."""
    base: dict[str, Any] | str | list[str] = Field({})
    """What all runs share: a config file, several in order, or sections written here."""
    search: Literal["grid", "list", "tpe"] = "grid"
    """grid: all combinations. list: the points named. tpe: points chosen by the results of earlier ones."""
    space: dict[str, Any] | list[dict[str, Any]]
    """grid: knob -> values. list: points, each knob -> value, with a name if you like. tpe: knob -> {min, max, log}
    or values."""
    trials: int | None = Field(None, ge=1)
    """tpe: how many points are tried."""
    seeds: list[Annotated[int, Field(ge=0, lt=FRESH_SEEDS)]] = Field(default=[0, 1, 2, 3])
    """Seeds of the search; a number n means 0 to n-1. The best two points get all of them, the best third of the points
    one fewer, all others two fewer."""
    baseline: dict[str, Any] = Field({})
    """What all points are compared with."""
    metric: str = "val/loss"
    """What is compared: its value at the last evaluation of a run, or, as in "best val/loss", at its best one."""
    tune: dict[str, list[Annotated[float, Field(gt=0)]]] | None = Field({"optimizer.lr": [0.5, 1.0, 2.0]}, max_length=1)
    """A knob and the multiples of its value that are tried for the best points and the baseline alike, so that a gain
    is not that of a learning rate. null: every point keeps its own, and the answer says so."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Runs at a time on this machine. auto: one a GPU, or one a core. More than there are GPUs: runs share them."""
    processes: int = Field(1, ge=1, le=1024)
    """Processes of each run, started by torchrun; each has a GPU, or its share of the run's cores."""
    storage: str | None = Field(None, pattern=r"^(sqlite:///.|postgresql(\+psycopg)?://.)")
    """Where the queue lives: a database URL. null: a SQLite file in the study's directory."""
    confirm_seeds: int = Field(8, ge=0, le=TUNING_SEEDS - FRESH_SEEDS)
    """Fresh seeds on which the winner and the baseline are run again; only from these is a gain claimed."""
    scale: Scale = Scale()
    """For ``study scale``: train_tokens, seeds, widths."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(seeds, list):
            if not seeds:
                raise ValueError("there must be at least one seed")
            twice = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
            if twice:
                raise ValueError(f"seed {', '.join(twice)} is given more than once")
        return seeds

    @field_validator("tune", mode="before")
    @classmethod
    def _tune(cls, value: Any) -> Any:
        return None if value is False else value  # YAML's "off"

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        if value in METRICS:
            return value
        if value.removeprefix("best ").startswith("test/"):
            raise ValueError("a study selects on val; its report gives the test")
        near = difflib.get_close_matches(value, METRICS, 1)
        raise ValueError(f"did you mean {near[0]}?" if near else f"must be one of {', '.join(METRICS)}")

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if (self.search == "tpe") != (self.trials is not None):
            raise ValueError("search: tpe needs 'trials', the number of points to try; grid and list take none")
        kind = list if self.search == "list" else dict
        if not isinstance(self.space, kind):
            what = "a list of points" if kind is list else "a mapping from knobs to values"
            raise ValueError(f"space must be {what} for search: {self.search}")
        if not self.space:
            raise ValueError("the space is empty: give at least one knob with its values")
        for knob, multiples in (self.tune or {}).items():
            if 1.0 not in multiples or len(set(multiples)) < 3 or sorted(set(multiples)) != multiples:
                raise ValueError(f"tune must give {knob} at least three multiples, ascending, with 1 among them")
        return self

    @property
    def minimize(self) -> bool:
        """Whether a smaller metric is the better one."""
        return not self.metric.endswith("val/accuracy")

    @property
    def rungs(self) -> list[list[int]]:
        """The search's seeds that all points get, then those of the best third, then those of the best two."""
        count = len(self.seeds)
        return [self.seeds[: max(1, count - 2)], self.seeds[: max(1, count - 1)], self.seeds]

    @property
    def fresh_seeds(self) -> list[int]:
        """Seeds by which nothing is chosen."""
        return list(range(FRESH_SEEDS, FRESH_SEEDS + self.confirm_seeds))

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds on which multiples of the tuned knob are tried."""
        return list(range(TUNING_SEEDS, TUNING_SEEDS + N_TUNING_SEEDS))

    @property
    def directory(self) -> Path:
        """Where everything of the study lies."""
        return Path(self.base_draft.values.get("run.dir") or "runs") / self.name

    def run_directory(self, point: Point, seed: int) -> Path:
        """Where the run of ``point`` with ``seed`` lies."""
        return self.directory / f"{point.name}-seed{seed}"

    def points(self) -> list[Point]:
        """The baseline, then all other points, none twice. tpe: those that have been started so far.

        Raises BadInput with all mistakes in the space.
        """
        points, mistakes = self.checked_points
        if mistakes:
            raise BadInput("\n".join(mistakes))
        return points + (self._found_points(points[0]) if self.search == "tpe" else [])

    def config(self, point: Point, seed: int) -> Config:
        """The config of one run."""
        where = {"run.seed": seed, "run.name": f"{point.name}-seed{seed}", "run.dir": str(self.directory)}
        where |= {"run.resume": "auto"}  # a base that never resumes is meant for a run of its own
        tags = [
            *(self.base_draft.values.get("tracking.tags") or []),
            *(point.name.split(",") if point.knobs else [point.name]),
        ]
        where |= {"tracking.group": self.name, "tracking.tags": [tag[:64] for tag in tags]}  # W&B takes no longer ones
        return self._make(point.knobs | where, f"point {point.name}")

    def tuned(self, point: Point, multiple: float) -> Point:
        """The point with another multiple of the tuned knob; itself at 1."""
        if multiple == 1:
            return point
        (knob,) = full_names(self.tune or {}, "tune", [])
        value = float(f"{self.config(point, 0).flat()[knob] * multiple:.4g}")
        return self.variation(point, {knob: value})

    def variation(self, point: Point, knobs: dict[str, Any]) -> Point:
        """The point with other knobs on top, named after it."""
        return Point(name_of(knobs, point.name), point.knobs | knobs, origin=point.origin or point.name)

    def ranges(self) -> dict[str, Range | list[Any]]:
        """grid, tpe: full name of each knob -> its values, or between which they are chosen."""
        return {
            knob: side
            if isinstance(side, Range)  # as numbers, where the file says 1e-3
            else [self._make({knob: value}, "the space").flat()[knob] for value in side]
            for knob, side in self._sides([]).items()
        }

    def warnings(self) -> list[str]:
        """What a reader of the results should know beforehand."""
        varied = {knob for point in self.checked_points[0] for knob in point.knobs} | set(self._sides([]))
        found = []
        if not self.confirm_seeds:
            found.append("confirm_seeds is 0: without fresh seeds the study explores, and nothing can be claimed")
        stops = "regularizers.early_stopping_patience"
        if stops in varied and not self.metric.startswith("best "):
            found.append(f"what early stopping keeps is the best evaluation; use metric: best {self.metric}")
        if any(knob in UNITS for knob in varied) and self.metric != "val/bits_per_byte":
            found.append(f"{self.metric} is per token and the points differ in tokens; use metric: val/bits_per_byte")
        configs = [self.config(point, 0).data.sources for point in self.checked_points[0]]
        if len({tuple((source.path, source.name) for source in sources) for sources in configs}) > 1:
            found.append(
                f"the points have different data.sources, on which {self.metric} is measured; vary weights only"
            )
        for knob in sorted(varied & MEASURED_ON):
            found.append(f"{knob} changes what {self.metric} is measured on; the points cannot be compared")
        return found

    def resolved(self) -> dict[str, Any]:
        """The study as a file that stands alone: the base written out."""
        return self.model_dump(mode="json") | {"base": self.base_draft.nested()}

    @cached_property
    def base_draft(self) -> Draft:
        """What the base says, and the mistakes in it."""
        draft = Draft()
        if isinstance(self.base, dict):
            draft.put_sections(self.base, "the base")
        else:
            for path in [self.base] if isinstance(self.base, str) else self.base:
                draft.read(path)
        return draft

    def _make(self, knobs: dict[str, Any], origin: str) -> Config:
        draft = self.base_draft.copy()
        for knob, value in knobs.items():
            draft.put(knob, value, origin)
        return draft.config()

    @cached_property
    def checked_points(self) -> tuple[list[Point], list[str]]:
        """All points that can be told beforehand, and all mistakes."""
        mistakes: list[str] = []
        of_base: set[str] = set()
        try:
            self._make({}, "")
        except BadInput as problem:
            of_base = set(str(problem).splitlines())
            mistakes += str(problem).splitlines()
        points: list[Point] = []
        seen: set[str] = set()
        wrong: dict[str, list[str]] = {}  # mistake -> the points that share it
        for name, knobs in self._raw_points(mistakes):
            try:
                config = self._make(knobs, PLACE).flat()
            except BadInput as problem:
                for line in sorted(set(str(problem).splitlines()) - of_base):
                    wrong.setdefault(line, []).append(name or name_of(knobs))
                continue
            identity = json.dumps(config, sort_keys=True)
            if identity not in seen:
                knobs = {knob: config[knob] for knob in knobs}  # as numbers, where the file says 1e-3
                points.append(Point(name or name_of(knobs), knobs))
            seen.add(identity)
        for line, names in wrong.items():
            place = f"point {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            mistakes.append(line.replace(PLACE, place) if PLACE in line else f"{line} ({place})")
        mistakes += self._tuning_mistakes(points)
        names = [point.name for point in points]
        for name in sorted({name for name in names if names.count(name) > 1}):
            mistakes.append(f"two points are named {name!r}; give each its own 'name:'")
        if self.search == "tpe":  # what was built besides the baseline are only the ends of the ranges
            points = points[:1]
        return points, list(dict.fromkeys(mistakes))

    def _tuning_mistakes(self, points: list[Point]) -> list[str]:
        mistakes: list[str] = []
        for knob in full_names(self.tune or {}, "tune", mistakes):
            if any(knob in point.knobs for point in points) or knob in self._sides([]):
                mistakes.append(f"{knob} is varied and tuned; leave it out of the space, or write tune: null")
            elif points and not isinstance(self.config(points[0], 0).flat()[knob], float):
                mistakes.append(f"{knob} cannot be tuned: it has no multiples")
        return mistakes

    def _raw_points(self, mistakes: list[str]) -> Iterable[tuple[str | None, dict[str, Any]]]:
        """Name (None: made from the knobs) and knobs of every point as the file has them, the baseline first."""
        yield BASELINE, full_names(self.baseline, "the baseline", mistakes)
        if isinstance(self.space, list):
            for number, entry in enumerate(self.space, 1):
                named = entry.get("name")
                place = f"point {number}"
                if named is not None and (
                    named == BASELINE or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,=+-]{,99}", str(named))
                ):
                    mistakes.append(
                        f"{place} cannot be named {named!r}: use letters, digits and . _ - = , +, "
                        f"at most {LONGEST_NAME} of them, and not {BASELINE!r}"
                    )
                knobs = {knob: value for knob, value in entry.items() if knob != "name"}
                yield named and str(named), full_names(knobs, place, mistakes)
            return
        sides = self._sides(mistakes)
        if self.search == "tpe":
            sides = {knob: [side.min, side.max] if isinstance(side, Range) else side for knob, side in sides.items()}
            if math.prod(map(len, sides.values())) > MOST_TRIED:  # a worker says which combinations are not possible
                yield from ((None, {knob: value}) for knob, values in sides.items() for value in values)
                return
        combinations: list[dict[str, Any]] = [{}]
        for knob, values in sides.items():
            combinations = [combination | {knob: value} for combination in combinations for value in values]
        yield from ((None, combination) for combination in combinations if combination)

    def _sides(self, mistakes: list[str]) -> dict[str, Any]:
        """Full name of each knob of the space -> its values, or its Range."""
        sides: dict[str, Any] = {}
        if isinstance(self.space, list):
            return sides
        for knob, side in full_names(self.space, "the space", mistakes).items():
            if isinstance(side, list) and side:
                if self.search == "tpe" and any(isinstance(value, (list, dict)) for value in side):
                    mistakes.append(f"{knob} in the space: tpe chooses among single values only")
                else:
                    sides[knob] = side
            elif isinstance(side, dict) and self.search == "tpe":
                try:
                    sides[knob] = Range.model_validate(side)
                except ValidationError as problem:
                    for error in problem.errors():
                        where = "".join(f".{part}" for part in error["loc"])
                        mistakes.append(f"{knob}{where} in the space: {error['msg'].removeprefix('Value error, ')}")
            else:
                way = "a list of values, as in [0, 0.1]" + (", or {min: 0, max: 1}" if self.search == "tpe" else "")
                mistakes.append(f"{knob} in the space must have {way}, not {side!r}")
        return sides

    def _found_points(self, baseline: Point) -> list[Point]:
        """The points that a search has started: what the config files in the study's directory say."""
        found = []
        for path in sorted(self.directory.glob(f"*-seed{self.seeds[0]}/config.yaml")):
            flat = read_config(path.parent).flat()
            knobs = {knob: flat[knob] for knob in self.ranges()}
            if path.parent.name == f"{name_of(knobs)}-seed{self.seeds[0]}":
                found.append(Point(name_of(knobs), knobs))
        return found


def keys() -> dict[str, FieldInfo]:
    """Every key of a study file by its name, those of ``scale`` with it before them."""
    own = {name: field for name, field in Study.model_fields.items() if name != "scale"}
    return own | {f"scale.{name}": field for name, field in Scale.model_fields.items()}


def read_study(path: str, **changes: str | None) -> Study:
    """The study that the file at ``path`` describes, with ``changes`` (workers, processes) where they are given.

    Raises BadInput with all mistakes in it at once.
    """
    content = load_yaml(path, "study file", "configs/studies")
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold 'name:', 'base:', 'space:', 'seeds:' and so on; see configs/studies")
    mistakes: list[str] = []
    content |= {name: value for name, value in changes.items() if value is not None}
    study = _validated(content, mistakes)
    if study is not None:
        mistakes += study.checked_points[1]
    if mistakes or study is None:
        raise BadInput("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return study


def _validated(content: dict[str, Any], mistakes: list[str]) -> Study | None:
    """The study without the keys that are wrong by themselves, so that its points can be checked all the same.

    None when no points can be told from what is left.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as problem:
        errors = {".".join(map(str, error["loc"][:1])): error for error in problem.errors()}
        mistakes += [_describe(key, error) for key, error in errors.items()]
    good = {key: value for key, value in content.items() if key not in errors}
    try:
        return Study.model_validate({"name": "study"} | good)
    except ValidationError:
        return None


def _describe(key: str, error: Any) -> str:
    message = (
        error["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    )
    if not key:
        return str(message)
    if error["type"] == "missing":
        return f"'{key}' is missing: {' '.join((Study.model_fields[key].description or '').split())}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(Study.model_fields), 1)
        return f"unknown key {key!r}; " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(Study.model_fields)}"
        )
    given = repr(error["input"])
    return f"{key} = {re.sub('//.*@', '//...@', given) if key == 'storage' else given}: {message}"
