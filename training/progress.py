"""How long a run is, and how far it has come. Both are plain numbers, so that a resumed run knows all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from config import BadInput, Config, Failure
from data.loader import DATA_ORDER, TrainingLoader
from regularizers.stopping import patience_is_over
from training.spikes import is_spike
from training.step import StepResult

STEPS_TO_DOUBLE = 2000  # finite gradients in a row after which fp16 tries twice the loss scale, as torch does


@dataclass(frozen=True)
class Plan:
    """What a run does at which step, a pure function of its config and the size of its corpus."""

    total_steps: int
    evaluation_every: Literal["epoch"] | int
    checkpoint_every: int | None
    milestones: frozenset[int]
    """Steps whose checkpoints are saved and kept."""
    steps_per_epoch: float
    epoch_at: Callable[[int], float]

    @classmethod
    def of(cls, config: Config, loader: TrainingLoader) -> Plan:
        """The plan of a run of ``config`` on the text of ``loader``."""
        epochs = config.training.max_epochs or 1
        total_steps = config.training.max_steps or max(1, round(epochs * loader.steps_per_epoch))
        return cls(
            total_steps=total_steps,
            evaluation_every=config.evaluation.every or max(1, total_steps // 10),
            checkpoint_every=config.checkpoint.every,
            milestones=frozenset(
                milestone_step(word, config.tokens_per_step, loader.steps_per_epoch) for word in config.checkpoint.at
            ),
            steps_per_epoch=loader.steps_per_epoch,
            epoch_at=loader.epoch_at,
        )

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after ``step`` steps."""
        if step == self.total_steps:
            return True
        if self.evaluation_every == "epoch":
            return int(self.epoch_at(step)) > int(self.epoch_at(step - 1))
        return step % self.evaluation_every == 0

    def milestones_out_of_reach(self) -> list[str]:
        """What to tell of milestones that lie behind the end of the run."""
        late = sorted(step for step in self.milestones if step > self.total_steps)
        ends = f"the run ends at step {self.total_steps:,}"
        return [f"checkpoint.at: step {step:,} will not be reached, {ends}" for step in late]

    def saves_at(self, progress: Progress) -> bool:
        """Whether a checkpoint is due: by interval or clock, of a milestone, of each new best, and of the last step."""
        step, best = progress.step, progress.best
        due = step % self.checkpoint_every == 0 if self.checkpoint_every else self.evaluates_at(step)
        due = due or step in self.milestones or progress.save_due
        return due or progress.over(self) or (best is not None and best["step"] == step)


def milestone_step(milestone: int | str, tokens_per_step: int, steps_per_epoch: float) -> int:
    """The first step after which a milestone of checkpoint.at is reached: 1000 (steps), 10M (tokens), 3epochs."""
    text = str(milestone)
    if text.isdecimal():
        return int(text)
    number = Fraction(re.sub("[^0-9.]", "", text))
    if "epoch" in text:
        return math.ceil(round(float(number) * steps_per_epoch, 6))  # 3 epochs of 5/3 steps are 5 steps
    return math.ceil(number * {"k": 10**3, "M": 10**6, "B": 10**9}[text[-1]] / tokens_per_step)


@dataclass(frozen=True)
class Judgement:
    """One evaluation: its metrics as metrics.jsonl names them, and a sample of text.

    ``scores`` (loss, bits_per_byte, ...) are those of the weights that are to be used: averaged ones when there are
    some.
    """

    record: dict[str, Any]
    scores: dict[str, float]


@dataclass
class Progress:
    """Where a run is after ``step`` steps: state.json, field by field. A new piece of state is one line here."""

    step: int = 0
    tokens: int = 0
    """Targets trained on, over all processes."""
    samples: int = 0
    """A fingerprint of all samples trained on; between two checkpoints, of this process's share of them."""
    data_order: int = DATA_ORDER
    """Which order of the data these were, as versions of the code differ in it."""
    best: dict[str, Any] | None = None
    """``step``, ``val/loss`` and ``val/bits_per_byte`` of the best evaluation."""
    val_losses: list[float] = field(default_factory=list)
    """Of all evaluations, by which early stopping judges."""
    losses: list[float] = field(default_factory=list)
    """Objectives of the last steps, by which a spike is told."""
    spikes: int = 0
    """Steps whose objective was a spike."""
    nonfinite: int = 0
    """Steps in a row, up to this one, whose gradient was not finite."""
    loss_scale: float = 2.0**16
    """fp16: what the next step's loss is multiplied by, so that its gradients are neither 0 nor infinite in fp16."""
    steps_at_scale: int = 0
    """fp16: steps in a row with this scale and a finite gradient."""
    average_from: int = 0
    """The averaged weights count what was trained after this step (see ``branched``)."""
    preempted: bool = field(default=False, metadata={"stored": False})
    stopped_early: bool = field(default=False, metadata={"stored": False})
    save_due: bool = field(default=False, metadata={"stored": False})

    def stored(self) -> dict[str, Any]:
        """What state.json holds."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("stored", True)}

    @classmethod
    def resumed(cls, state: dict[str, Any], config: Config, checkpoint: Path | None = None) -> Progress:
        """The progress that ``stored`` wrote; what it does not know, of an older version of the code, is left out.

        Raises BadInput if that version saw the data in another order: some would be seen twice and some not at all.
        ``checkpoint`` is where the state was read, for that message.
        """
        order = state.get("data_order", 1)
        if order != DATA_ORDER:
            raise BadInput(
                f"{checkpoint} is of another version of wellposed, which sees the data in another order (data_order "
                f"{order}, here {DATA_ORDER}), so this one cannot go on from it; use that version (versions.commit in "
                "summary.json), start afresh with --run.resume=never (what is there is moved aside), or begin a run of "
                "another --run.name with its weights: --run.init_from"
            )
        names = {item.name for item in fields(cls)}
        progress = cls(**{name: value for name, value in state.items() if name in names})
        progress.stopped_early = patience_is_over(progress.val_losses, config.regularizers)
        return progress

    @classmethod
    def branched(cls, state: dict[str, Any], config: Config, average_goes_on: bool, checkpoint: Path) -> Progress:
        """Where a run begins that branches from another one's ``state``: at its step, as if it were one run.

        What the other was judged by stays with it: the best evaluation, whose checkpoint is in its directory, and the
        patience of early stopping begin anew. ``average_goes_on``: whether its averaged weights are taken over with
        their count; if not, the average counts the weights after this step alone.
        """
        progress = cls.resumed(state | {"best": None, "val_losses": []}, config, checkpoint)
        if not average_goes_on:
            progress.average_from = progress.step
        return progress

    def count(self, result: StepResult, config: Config) -> None:
        """Take in a step. Raises Failure when too many in a row had a gradient that was not finite."""
        self.step += 1
        self.tokens = self.step * config.tokens_per_step
        self.samples += result.samples
        self.preempted, self.save_due = result.preempted, result.save_due
        overflowed = self.adapt_loss_scale(result)
        self.nonfinite = 0 if result.is_finite or overflowed else self.nonfinite + 1
        if self.nonfinite >= config.training.max_nonfinite:
            raise Failure(
                f"step {self.step}: the gradient was not finite {self.nonfinite} times in a row; lower optimizer.lr, "
                "and start again to go on from the last checkpoint"
            )
        result.is_spike = is_spike(result.terms["objective"], self.losses)
        self.spikes += result.is_spike

    def adapt_loss_scale(self, result: StepResult) -> bool:
        """Take in a step's gradient, of fp16; returns whether a smaller scale may make such a one finite.

        As torch.amp.GradScaler does: half of the scale after a gradient that is not finite, twice the scale after
        STEPS_TO_DOUBLE finite ones. Not below 1: there the gradient itself is to blame.
        """
        if result.loss_scale is None:
            return False
        self.steps_at_scale = self.steps_at_scale + 1 if result.is_finite else 0
        if not result.is_finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.steps_at_scale == STEPS_TO_DOUBLE:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0
        return not result.is_finite and result.loss_scale > 1

    def judge(self, judgement: Judgement, config: Config) -> None:
        """Take in an evaluation after this step."""
        loss, bits = judgement.scores["loss"], judgement.scores["bits_per_byte"]
        self.val_losses.append(loss)
        if math.isfinite(loss) and (self.best is None or loss < self.best["val/loss"]):
            self.best = {"step": self.step, "val/loss": loss, "val/bits_per_byte": bits}
        self.stopped_early = patience_is_over(self.val_losses, config.regularizers)

    def finished(self, plan: Plan) -> bool:
        """Whether all is trained that will be."""
        return self.step >= plan.total_steps or self.stopped_early

    def over(self, plan: Plan) -> bool:
        """Whether no further step follows now: finished, or told to stop."""
        return self.preempted or self.finished(plan)
