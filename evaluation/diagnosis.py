"""Is this run underfitting, well fitted or overfitting, how can one see it, and what is the next thing to try.

Only the curves are read. The judgement weighs four things, each against the
noise of the curve it is read from:

    turned up    how far the validation loss has risen over its best value, in its smoothed form
    gap          validation minus training loss, as a share of the validation loss, and whether it widens
    train        what the training loss still loses over the last fifth of the run
    val          what the validation loss still loses there

Regularization raises the training loss of the batches (dropout, noise), so the training loss in evaluation mode,
``val/loss - gap/loss``, is used where it was recorded. The advice follows the practical recipe: AdamW with mild decay
and no dropout first; against overfitting more weight decay, then dropout, then data augmentation, early stopping and
averaging; against underfitting less of these, a longer run, a larger model.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from config import Config, Regularizers
from evaluation.curves import Series, series
from evaluation.curves import read_curves as read_curves  # the other half of diagnosing a file

UNDERFITTING, WELL_FITTED, OVERFITTING = "underfitting", "well fitted", "overfitting"
TOO_EARLY = "too early to tell"

FEWEST_EVALUATIONS = 5
NOISES = 3.0  # how many standard deviations of a curve's noise count as a movement of the curve
SMALLEST_RISE = 0.005  # share of the best validation loss that it must have risen by
SMALLEST_FALL = 0.01  # share of a loss that it must lose over the last fifth to count as falling
FAST_FALL = 0.02  # share of the validation loss: a longer run comes before a larger model then
SMALL_GAP, LARGE_GAP = 0.06, 0.15  # shares of the validation loss; two parts of one text may differ by some percent


@dataclass(frozen=True)
class Diagnosis:
    """``verdict`` is one of underfitting, well fitted, overfitting, too early to tell; evidence and advice are
    sentences, the advice in the order in which to try it."""

    verdict: str
    evidence: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """One line, for a picture or a table."""
        return f"{self.verdict}: {self.evidence[0]}" if self.evidence else self.verdict

    def text(self) -> str:
        """A few plain lines for the console, no newline at the end."""
        lines = [f"diagnosis         {self.verdict}", *(f"  - {line}" for line in self.evidence)]
        if self.advice:
            lines += ["what to try next", *(f"  {number}. {line}" for number, line in enumerate(self.advice, 1))]
        return "\n".join(lines)


def diagnose(records: list[dict[str, Any]], config: Config | None = None) -> Diagnosis:
    """The verdict on a run from its curves.

    Args:
        records: the lines of metrics.jsonl, or what ``read_curves`` returns: ``step``, and where they were logged
            ``epoch``, ``train/loss``, ``val/loss``, ``val_average/loss``, ``gap/loss``, in nats per token.
            Averaged weights are judged where they were evaluated five times or more.
        config: that of the run; the advice then names the next value of each knob instead of a typical one.

    Losses that are not finite are left out, and the evidence says so.
    """
    raw, average = series(records, "val/loss"), series(records, "val_average/loss")
    averaged = len(average) >= FEWEST_EVALUATIONS or not len(raw)  # an average over the end of a run starts late
    val = average if averaged else raw
    evidence, epochs = about_the_run(records)
    if averaged and len(val):
        evidence.append("judged by the averaged weights")
    if len(val) < FEWEST_EVALUATIONS:
        evidence.insert(
            0, f"{len(val)} evaluations of the validation loss are too few; {FEWEST_EVALUATIONS} are needed"
        )
        return Diagnosis(TOO_EARLY, evidence, ["train on, or evaluate more often (--evaluation.every)"])
    train, gap, exact = training_loss(records, raw if len(raw) else val)
    facts = measure(val, train, gap, exact)
    evidence = facts.sentences(unit_of(records), exact) + evidence
    verdict = facts.verdict()
    advice = advise(verdict, facts, epochs, raw.steps[-1] if len(raw) else val.steps[-1], config)
    return Diagnosis(verdict, evidence, advice)


# ---------------------------------------------------------------------------------------------- what the curves say


@dataclass(frozen=True)
class Facts:
    """What was measured on the curves; losses in nats per token, None where there was no training loss."""

    best_step: float
    best: float
    last_step: float
    last: float
    rise: float  # of the smoothed validation loss over its lowest value
    val_noise: float
    val_fall: float  # over the last fifth
    val_fall_error: float  # standard error of it
    train_fall: float | None
    train_fall_error: float
    train_fall_halfway: float  # since the middle of the run, smoothed
    train_rise: float | None  # of the training loss since the validation loss was best
    train_noise: float
    gap: float | None  # at the end
    gap_halfway: float | None

    @property
    def turned_up(self) -> bool:
        """Whether the validation loss has left its best value by more than noise."""
        return self.rise > max(NOISES * self.val_noise, SMALLEST_RISE * self.best)

    @property
    def diverged(self) -> bool:
        """Whether the training loss rose too: then what was learnt is lost, and nothing was memorized."""
        return self.turned_up and self.train_rise is not None and self.train_rise > 0.5 * self.rise

    @property
    def val_falls(self) -> bool:
        """Whether the validation loss still falls at the end."""
        return self.val_fall > max(NOISES * self.val_fall_error, SMALLEST_FALL * self.last)

    @property
    def train_falls(self) -> bool:
        """Whether the training loss, in evaluation mode if that is known, still falls at the end."""
        if self.train_fall is None or self.gap is None:
            return False
        return self.train_fall > max(NOISES * self.train_fall_error, SMALLEST_FALL * (self.last - self.gap))

    @property
    def relative_gap(self) -> float | None:
        """The gap at the end as a share of the validation loss."""
        return None if self.gap is None else self.gap / self.last

    @property
    def widens(self) -> bool:
        """Whether the gap has grown by a tenth and by more than noise since the middle of the run."""
        if self.gap is None or self.gap_halfway is None:
            return False
        growth = self.gap - self.gap_halfway
        return growth > max(0.1 * abs(self.gap), self.val_noise + self.train_noise)

    @property
    def memorizes(self) -> bool:
        """Whether most of what is still learnt about the training text is of no use for other text."""
        if self.relative_gap is None or self.gap is None or self.gap_halfway is None:
            return False
        useless = self.gap - self.gap_halfway > self.train_fall_halfway / 2
        falls = self.train_fall_halfway > max(NOISES * self.train_noise, SMALLEST_FALL * (self.last - self.gap))
        return self.relative_gap > LARGE_GAP and falls and useless

    def verdict(self) -> str:
        """The rule."""
        if self.diverged:
            return UNDERFITTING
        if self.turned_up or self.memorizes:
            return OVERFITTING
        if self.val_falls:
            return UNDERFITTING
        if self.relative_gap is None:
            return TOO_EARLY
        return UNDERFITTING if self.relative_gap < SMALL_GAP else WELL_FITTED

    def sentences(self, unit: str, exact: bool) -> list[str]:
        """The evidence in numbers; ``exact``: the gap was measured in evaluation mode."""
        here, there = f"{unit} {self.best_step:,g}", f"{unit} {self.last_step:,g}"
        if self.turned_up:
            noise = f", {self.rise / self.val_noise:,.0f} times its noise" if self.val_noise > 1e-9 else ""
            lines = [f"val was best at {here} ({self.best:.4f}) and rose to {self.last:.4f} at {there}{noise}"]
        elif self.val_falls:
            share = self.val_fall / self.last
            lines = [f"val still falls, by {share:.1%} over the last fifth, to {self.last:.4f} at {there}"]
        else:
            lines = [f"val is level at the end: {self.last:.4f} at {there}, best {self.best:.4f} at {here}"]
        if self.relative_gap is None or self.gap is None:
            return [*lines, "no training loss was given, so a level curve can mean any fit"]
        source = "" if exact else ", from the loss of training batches, which dropout and noise raise"
        way = "widening" if self.widens else "not widening"
        halfway = "" if self.gap_halfway is None else f", {way} (halfway {self.gap_halfway:+.4f})"
        lines.append(f"gap val - train {self.gap:+.4f}, {self.relative_gap:.1%} of val{halfway}{source}")
        fall = (self.train_fall or 0.0) / (self.last - self.gap)
        if self.diverged:
            lines.append(f"train rose as well, by {self.train_rise:.4f} since val was best: training became unstable")
        elif self.train_falls:
            lines.append(f"train still falls, by {fall:.1%} over the last fifth")
        else:
            lines.append(f"train is level at the end, up to its noise ({-fall:+.1%} over the last fifth)")
        return lines


def measure(val: Series, train: Series | None, gap: Series | None, exact: bool) -> Facts:
    """All that the verdict rests on; ``val`` has at least five points. A gap that is not ``exact`` is smoothed."""
    smoothed = val.smooth()
    lowest = min(range(len(val)), key=smoothed.values.__getitem__)
    best = min(range(len(val)), key=val.values.__getitem__)
    middle = (val.steps[0] + val.steps[-1]) / 2
    val_fall, val_fall_error = val.late_fall()
    train_fall, train_fall_error = (None, 0.0) if train is None else train.late_fall()
    gap = gap.smooth() if gap is not None and not exact else gap
    level = None if train is None else train.smooth()
    since = None if level is None else level.values[-1] - level.at(val.steps[lowest])
    return Facts(
        best_step=val.steps[best],
        best=val.values[best],
        last_step=val.steps[-1],
        last=val.values[-1],
        rise=smoothed.values[-1] - smoothed.values[lowest],
        val_noise=val.noise,
        val_fall=val_fall,
        val_fall_error=val_fall_error,
        train_fall=train_fall,
        train_fall_error=train_fall_error,
        train_fall_halfway=0.0 if level is None else level.at(middle) - level.values[-1],
        train_rise=since,
        train_noise=0.0 if train is None else train.noise,
        gap=None if gap is None else gap.values[-1],
        gap_halfway=None if gap is None else gap.at(middle),
    )


def training_loss(records: list[dict[str, Any]], val: Series) -> tuple[Series | None, Series | None, bool]:
    """The training loss and the gap at the steps of ``val``, and whether they are those of evaluation mode.

    Without ``gap/loss`` the logged losses of batches between two evaluations are averaged, half of them from
    before the step and half from after it, so that a falling curve is not read as lagging behind.
    """
    gap = series(records, "gap/loss")
    both = [step for step in gap.steps if step in set(val.steps)]
    if len(both) >= FEWEST_EVALUATIONS:
        values = dict(zip(val.steps, val.values, strict=True))
        gaps = dict(zip(gap.steps, gap.values, strict=True))
        return Series(both, [values[step] - gaps[step] for step in both]), gap, True
    batches = series(records, "train/loss")
    if len(batches) < FEWEST_EVALUATIONS:
        return None, None, False
    losses, reach = [], (val.steps[-1] - val.steps[0]) / (len(val) - 1) / 2
    for step in val.steps:
        pairs = zip(batches.steps, batches.values, strict=True)
        near = [value for other, value in pairs if abs(other - step) <= reach]
        losses.append(statistics.fmean(near) if near else batches.at(step))
    train = Series(val.steps, losses)
    gaps_there = [value - loss for value, loss in zip(val.values, losses, strict=True)]
    return train, Series(val.steps, gaps_there), False


def unit_of(records: list[dict[str, Any]]) -> str:
    """``epoch`` for curves that were recorded by epochs alone."""
    return "epoch" if records and all(record.get("epoch") == record.get("step") for record in records) else "step"


def about_the_run(records: list[dict[str, Any]]) -> tuple[list[str], float | None]:
    """Sentences on what is no judgement, and the epochs seen."""
    epochs = series(records, "epoch")
    seen = epochs.values[-1] if len(epochs) else None
    lines = []
    if seen is not None:
        lines.append(f"{seen:,.2f} epochs seen" + (": no text twice yet" if seen <= 1 else ""))
    names = ("train/loss", "val/loss", "val_average/loss")
    broken = [
        (record["step"], name)
        for record in records
        for name in names
        if isinstance(record.get(name), (int, float)) and not math.isfinite(record[name]) and "step" in record
    ]
    if broken:
        lines.append(f"{len(broken)} losses are not finite, the first ({broken[0][1]}) at step {broken[0][0]:,g}")
    return lines, seen


# ---------------------------------------------------------------------------------------------- what to do about it

DROPOUTS = ("residual_dropout", "attention_dropout", "mlp_dropout", "embedding_dropout")


def advise(verdict: str, facts: Facts, epochs: float | None, last_step: float, config: Config | None) -> list[str]:
    """The next steps of the recipe, first things first, as flags of train.py."""
    if verdict == OVERFITTING:
        return against_overfitting(facts, epochs, config)
    if verdict == UNDERFITTING:
        return against_underfitting(facts, epochs, last_step, config)
    if verdict == TOO_EARLY:
        return ["log a training loss as well, or train on until the curve turns"]
    return [
        "keep this; a change from here is small, so compare it over several seeds (--run.seed=1)",
        "a larger model with more weight decay is the usual way further",
        *averaging(config),
    ]


def against_overfitting(facts: Facts, epochs: float | None, config: Config | None) -> list[str]:
    """More weight decay, then dropout, then augmentation, early stopping, averaging."""
    known = config.regularizers if config else None
    advice = []
    decay = known.weight_decay if known else 0.1
    if decay == 0:
        advice.append("decay the weights: --regularizers.weight_decay=0.1, then 0.3 and 1")
    elif decay < 3:
        now = f" (now {decay:g})" if known else ""
        advice.append(
            f"raise weight decay 3 to 10 times{now}: --regularizers.weight_decay={3 * decay:.2g}, then {10 * decay:.2g}"
        )
    rate = max((getattr(known, name) for name in DROPOUTS), default=0.0) if known else 0.0
    if rate < 0.45:
        new = 0.1 if rate == 0 else min(0.5, rate + 0.1)
        flags = f"--regularizers.residual_dropout={new:.2g} --regularizers.attention_dropout={new:.2g}"
        advice.append(f"{'add' if rate == 0 else 'raise'} dropout: {flags}, then {min(0.5, new + 0.1):.2g} and more")
    if known is None or known.token_replacement == 0:
        advice.append("augment the text: --regularizers.token_replacement=0.1, or --data.transform=MODULE:FUNCTION")
    if facts.turned_up and (known is None or known.early_stopping_patience == 0):
        advice.append("stop in time: --regularizers.early_stopping_patience=3 (its best checkpoint is what is used)")
    advice += averaging(config)
    if epochs is not None and epochs > 4:
        advice.append(f"more text helps most of all: this one was read {epochs:,.0f} times")
    return advice


def against_underfitting(facts: Facts, epochs: float | None, last_step: float, config: Config | None) -> list[str]:
    """A calmer, longer or less regularized run, or a larger model: which first depends on what still moves."""
    if facts.diverged:
        lr = f"={config.optimizer.lr / 3:.2g} (now {config.optimizer.lr:g})" if config else " to a third"
        return [f"lower the learning rate: --optimizer.lr{lr}", "warm up longer (--schedule.warmup_steps)"]
    if config and config.training.max_epochs:
        longer = f"train longer: --training.max_epochs={2 * config.training.max_epochs:g}"
    else:
        longer = f"train longer: --training.max_steps={2 * last_step:.0f}"
    less = lower(config, epochs)
    shape = config.model if config else None
    flags = f"--model.d_model={2 * shape.d_model} --model.n_layers={shape.n_layers + 2}" if shape else "--model.d_model"
    grow = f"grow the model: {flags}"
    # What crawls needs more capacity, what runs needs more time.
    running = facts.val_fall > FAST_FALL * facts.last
    return [longer, *less, grow] if running else [*less, grow, longer]


def lower(config: Config | None, epochs: float | None) -> list[str]:
    """The regularizers that are on and keep the model from fitting, to be switched off or lowered."""
    if config is None:
        return ["lower what regularizes: dropout to 0, --regularizers.weight_decay=0.1 or less"]
    known = config.regularizers
    flags = [
        f"--regularizers.{name}={off}"
        for name, off, kind in knobs_off()
        if kind in ("activation", "input", "objective") and getattr(known, name) != off
    ]
    for name in ("l1", "l2"):
        if getattr(known, name, 0):
            flags.append(f"--regularizers.{name}=0")
    if known.weight_decay > 0.1:
        flags.append(f"--regularizers.weight_decay={known.weight_decay / 3:.2g}")
    once = " (within one epoch dropout only costs)" if epochs is not None and epochs <= 1 and flags else ""
    return [f"regularize less{once}: {' '.join(flags)}"] if flags else []


def knobs_off() -> list[tuple[str, Any, str]]:
    """Every knob of the regularizers section with its off value and its kind."""
    extras = {name: field.json_schema_extra for name, field in Regularizers.model_fields.items()}
    return [(name, extra["off"], str(extra["kind"])) for name, extra in extras.items() if isinstance(extra, dict)]


def averaging(config: Config | None) -> list[str]:
    """Averaging of the weights, if it is not on already."""
    known = config.regularizers if config else None
    if known is not None and (known.ema_decay or known.swa_start is not None):
        return []
    return ["average the weights, which is nearly free: --regularizers.ema_decay=0.999"]
