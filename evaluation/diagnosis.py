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
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import Config, Regularizers
from evaluation.curves import Series, series
from evaluation.curves import read_curves as read_curves  # the other half of diagnosing a file

UNDERFITTING, WELL_FITTED, OVERFITTING = "underfitting", "well fitted", "overfitting"
TOO_EARLY = "too early to tell"
RISES, FALLS, LEVEL = "rises", "falls", "is level"  # what a loss does at the end of the run
SMALL, MODERATE, MEMORIZING = "small", "moderate", "memorizing"  # gaps between validation and training loss
UNKNOWN = "unknown"

LOSSES = ("train/loss", "val/loss", "val_average/loss")
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

    Losses that are not finite are left out, and the evidence says so; at the end they are a training that broke.
    """
    raw, average = series(records, "val/loss"), series(records, "val_average/loss")
    averaged = len(average) >= FEWEST_EVALUATIONS or not len(raw)  # an average over the end of a run starts late
    val = average if averaged else raw
    evidence, epochs = about_the_run(records)
    if averaged and len(val):
        evidence.append("judged by the averaged weights")
    if len(val) < FEWEST_EVALUATIONS:
        few = f"{len(val)} evaluations of the validation loss are too few; {FEWEST_EVALUATIONS} are needed"
        return Diagnosis(TOO_EARLY, [few, *evidence], ["train on, or evaluate more often (--evaluation.every)"])
    by_epochs = all(record.get("epoch") == record.get("step") for record in records)
    val_moves, sentence = about_val(val, "epoch" if by_epochs else "step")
    sentences, train_moves, size = [sentence], UNKNOWN, UNKNOWN
    training = training_loss(records, raw if len(raw) else val)
    if training is None:
        sentences.append("no training loss was given, so a level curve can mean any fit")
    else:
        size, sentence = about_gap(val, *training)
        train_moves, other = about_train(val, *training[:2], val_moves == RISES)
        sentences += [sentence, other]
    if train_moves == RISES or ends_broken(records):
        verdict, advice = UNDERFITTING, calm(config)
    elif val_moves == RISES or size == MEMORIZING:
        verdict, advice = OVERFITTING, regularize_more(val_moves == RISES, epochs, config)
    elif val_moves == FALLS or size == SMALL:
        verdict, advice = UNDERFITTING, learn_more(val, epochs, config)
    elif size == UNKNOWN:
        verdict, advice = TOO_EARLY, ["log a training loss as well, or train on until the curve turns"]
    else:
        verdict, advice = WELL_FITTED, go_on(config)
    return Diagnosis(verdict, sentences + evidence, advice)


# ---------------------------------------------------------------------------------------------- what the curves say


def about_val(val: Series, unit: str) -> tuple[str, str]:
    """How the validation loss moves at the end, against its noise, and the numbers in a sentence."""
    best, noise, last = val.values.argmin(), val.noise, val.last
    lowest, here, there = val.values[best], f"{unit} {val.steps[best]:,g}", f"{unit} {val.steps[-1]:,g}"
    rise, (fall, error) = val.rise(val.lowest()), val.late_fall()
    if moved(rise, noise, SMALLEST_RISE * lowest):
        times = f", {rise / noise:,.0f} times its noise" if noise > 1e-9 else ""
        return RISES, f"val was best at {here} ({lowest:.4f}) and rose to {last:.4f} at {there}{times}"
    if moved(fall, error, SMALLEST_FALL * last):
        return FALLS, f"val still falls, by {share(fall, last):.1%} over the last fifth, to {last:.4f} at {there}"
    return LEVEL, f"val is level at the end: {last:.4f} at {there}, best {lowest:.4f} at {here}"


def about_train(val: Series, train: Series, gap: Series, turned_up: bool) -> tuple[str, str]:
    """The same of the training loss, in evaluation mode if that is known.

    It rises when, with the validation loss, it has lost what was learnt: then nothing was memorized.
    """
    rise, (fall, error), level = train.rise(val.lowest()), train.late_fall(), val.last - gap.last
    if turned_up and rise > 0.5 * val.rise(val.lowest()):
        return RISES, f"train rose as well, by {rise:.4f} since val was best: training became unstable"
    if moved(fall, error, SMALLEST_FALL * level):
        return FALLS, f"train still falls, by {share(fall, level):.1%} over the last fifth"
    return LEVEL, f"train is level at the end, up to its noise ({-share(fall, level):+.1%} over the last fifth)"


def about_gap(val: Series, train: Series, gap: Series, exact: bool) -> tuple[str, str]:
    """How large the gap is at the end, and the numbers in a sentence; ``exact``: measured in evaluation mode.

    It is that of memorizing when it is large and most of what is still learnt about the training text is of no use
    for other text.
    """
    middle, relative = float(val.steps[0] + val.steps[-1]) / 2, share(gap.last, val.last)
    halfway, fall = gap.at(middle), -train.rise(middle)
    growth = gap.last - halfway
    learns = moved(fall, train.noise, SMALLEST_FALL * (val.last - gap.last))
    widens = growth > max(0.1 * abs(gap.last), val.noise + train.noise)
    source = "" if exact else ", from the loss of training batches, which dropout and noise raise"
    sentence = (
        f"gap val - train {gap.last:+.4f}, {relative:.1%} of val, "
        f"{'widening' if widens else 'not widening'} (halfway {halfway:+.4f}){source}"
    )
    if relative > LARGE_GAP and learns and growth > fall / 2:
        return MEMORIZING, sentence
    return SMALL if relative < SMALL_GAP and val.last > 0 else MODERATE, sentence


def moved(change: float, noise: float, smallest: float) -> bool:
    """Whether a change is more than noise and more than the smallest that matters."""
    return change > max(NOISES * noise, smallest)


def share(part: float, whole: float) -> float:
    """``part`` as a share of ``whole``; 0 of a loss that has reached exactly 0, as it does on constant text."""
    return part / whole if whole else 0.0


def training_loss(records: list[dict[str, Any]], val: Series) -> tuple[Series, Series, bool] | None:
    """The training loss, the gap to it, and whether both were measured in evaluation mode; None if it is not known.

    Without ``gap/loss`` the logged losses of batches between two evaluations are averaged, half of them from
    before the step and half from after it, so that a falling curve is not read as lagging behind.
    """
    gap = series(records, "gap/loss")
    steps, of_val, of_gap = np.intersect1d(val.steps, gap.steps, return_indices=True)
    if len(steps) >= FEWEST_EVALUATIONS:
        return Series(steps, val.values[of_val] - gap.values[of_gap]), gap, True
    batches = series(records, "train/loss")
    if len(batches) < FEWEST_EVALUATIONS:
        return None
    reach = (val.steps[-1] - val.steps[0]) / (len(val) - 1) / 2
    near = [batches.values[abs(batches.steps - step) <= reach] for step in val.steps]
    pairs = zip(val.steps, near, strict=True)
    losses = np.array([values.mean() if len(values) else batches.at(step) for step, values in pairs])
    return Series(val.steps, losses), Series(val.steps, val.values - losses).smooth(), False


def ends_broken(records: list[dict[str, Any]]) -> bool:
    """Whether the last training or validation loss is not finite."""
    last = {name: record[name] for record in records for name in LOSSES if isinstance(record.get(name), (int, float))}
    return not all(map(math.isfinite, last.values()))


def about_the_run(records: list[dict[str, Any]]) -> tuple[list[str], float | None]:
    """Sentences on what does not decide the verdict, and the epochs seen."""
    epochs = series(records, "epoch")
    seen = epochs.last if len(epochs) else None
    lines = [] if seen is None else [f"{seen:,.2f} epochs seen" + (": no text twice yet" if seen <= 1 else "")]
    broken = [
        (record["step"], name)
        for record in records
        for name in LOSSES
        if isinstance(record.get(name), (int, float)) and not math.isfinite(record[name]) and "step" in record
    ]
    if broken:
        lines.append(f"{len(broken)} losses are not finite, the first ({broken[0][1]}) at step {broken[0][0]:,g}")
    return lines, seen


# ---------------------------------------------------------------------------------------------- what to do about it


def go_on(config: Config | None) -> list[str]:
    """When the fit is good."""
    return [
        "keep this; a change from here is small, so compare it over several seeds (--run.seed=1)",
        "a larger model with more weight decay is the usual way further",
        *averaging(config),
    ]


def calm(config: Config | None) -> list[str]:
    """When training became unstable."""
    lr = f"={config.optimizer.lr / 3:.2g} (now {config.optimizer.lr:g})" if config else " to a third"
    return [f"lower the learning rate: --optimizer.lr{lr}", "warm up longer (--schedule.warmup_steps)"]


def regularize_more(turned_up: bool, epochs: float | None, config: Config | None) -> list[str]:
    """Against overfitting: more weight decay, then dropout, then augmentation, early stopping, averaging."""
    knobs = (config or Config()).regularizers
    advice = []
    decay = knobs.weight_decay
    if decay == 0:
        advice.append("decay the weights: --regularizers.weight_decay=0.1, then 0.3 and 1")
    elif decay < 3:
        now = f" (now {decay:g})" if config else ""
        flag = f"--regularizers.weight_decay={3 * decay:.2g}"
        advice.append(f"raise weight decay 3 to 10 times{now}: {flag}, then {10 * decay:.2g}")
    rate = max(knobs.residual_dropout, knobs.attention_dropout, knobs.mlp_dropout, knobs.embedding_dropout)
    if rate < 0.45:
        new = 0.1 if rate == 0 else min(0.5, rate + 0.1)
        flags = f"--regularizers.residual_dropout={new:.2g} --regularizers.attention_dropout={new:.2g}"
        advice.append(f"{'add' if rate == 0 else 'raise'} dropout: {flags}, then {min(0.5, new + 0.1):.2g} and more")
    if knobs.token_replacement == 0:
        advice.append("augment the text: --regularizers.token_replacement=0.1, or --data.transform=MODULE:FUNCTION")
    if turned_up and knobs.early_stopping_patience == 0:
        advice.append("stop in time: --regularizers.early_stopping_patience=3 (its best checkpoint is what is used)")
    advice += averaging(config)
    if epochs is not None and epochs > 4:
        advice.append(f"more text helps most of all: this one was read {epochs:,.0f} times")
    return advice


def learn_more(val: Series, epochs: float | None, config: Config | None) -> list[str]:
    """Against underfitting: a longer or less regularized run, or a larger model, by how fast the loss still falls."""
    if config and config.training.max_epochs:
        longer = f"train longer: --training.max_epochs={2 * config.training.max_epochs:g}"
    else:
        longer = f"train longer: --training.max_steps={2 * val.steps[-1]:.0f}"
    longer += ", anew, or on from here with --run.branch_from"
    less, grow = lower(config, epochs), ["grow the model: --model.d_model"]
    if config:
        grow[0] += f"={2 * config.model.d_model} --model.n_layers={config.model.n_layers + 2}"
        if config.run.init_from or config.run.branch_from:
            grow = []  # its weights fit no other model
    # A loss that falls fast needs more time, one that falls slowly more capacity.
    fast = val.late_fall()[0] > FAST_FALL * val.last
    return [longer, *less, *grow] if fast else [*less, *grow, longer]


def lower(config: Config | None, epochs: float | None) -> list[str]:
    """The regularizers that are on and keep the model from fitting, to be switched off or lowered."""
    if config is None:
        return ["lower what regularizes: dropout to 0, --regularizers.weight_decay=0.1 or less"]
    knobs, flags = config.regularizers, []
    for name, knob in Regularizers.model_fields.items():
        extra: Any = knob.json_schema_extra
        hinders = extra["kind"] in ("activation", "input", "objective") or name in ("l1", "l2")
        hinders &= name != "distillation_weight"  # its teachers show what can be fitted
        if hinders and getattr(knobs, name) != extra["off"]:
            flags.append(f"--regularizers.{name}={extra['off']}")
    if knobs.weight_decay > 0.1:
        flags.append(f"--regularizers.weight_decay={knobs.weight_decay / 3:.2g}")
    once = " (within one epoch dropout only costs)" if epochs is not None and epochs <= 1 and flags else ""
    return [f"regularize less{once}: {' '.join(flags)}"] if flags else []


def averaging(config: Config | None) -> list[str]:
    """Averaging of the weights, if it is not on already."""
    knobs = (config or Config()).regularizers
    if knobs.ema_decay or knobs.swa_start is not None:
        return []
    return ["average the weights, which is nearly free: --regularizers.ema_decay=0.999"]
