"""What a run's evaluations are made of: the validation split, as much of the training text, and the test at the end."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pictures
from config import Config
from data.loader import EvaluationBatches
from data.shards import Corpus, Split
from evaluation.diagnosis import diagnose
from evaluation.evaluate import Calibration, Part, evaluate_parts, parts_of
from files import write_text
from model.generate import sample_text
from program import warn
from tracking.load_run import has_average
from tracking.run import Run
from training.checkpoint import each_tensor
from training.faults import inject_fault
from training.learner import Learner
from training.progress import Judgement

SECONDS_BETWEEN_PICTURES = 30.0  # drawing takes half a second, in which all processes wait


class Judge:
    """Evaluates the model of a run while it trains.

    Args:
        corpus: its val and test splits are judged by.
        trained: the training text of each source; of it as much as of its val is evaluated, for the gap.
        config: that of the run.
    """

    def __init__(self, corpus: Corpus, trained: list[Split], config: Config) -> None:
        self.corpus, self.config = corpus, config
        self.val = parts_of(corpus.portions("val"), self._batches, config.evaluation.max_tokens)
        self.gap = [
            replace(part, name=None, batches=self._batches(split, part.batches.split.n_tokens))
            for part, split in zip(self.val, trained, strict=True)
        ]
        self.tokenizer = corpus.tokenizer()
        self.calibration: Calibration | None = None  # of the last evaluation
        self.drawn = time.monotonic()

    def _batches(self, split: Split, max_tokens: int | None) -> EvaluationBatches:
        config = self.config
        return EvaluationBatches(
            split, config.model.context_length, config.evaluation_batch_size, max_tokens, config.data.isolate_documents
        )

    def __call__(self, learner: Learner, step: int) -> Judgement:
        """Evaluate the weights after ``step`` steps, and their average when there is one."""
        inject_fault("evaluate", step)
        model = learner.model
        scores, calibration = self._evaluate(learner, self.val)
        record: dict[str, Any] = {f"val/{name}": value for name, value in scores.items()}
        record["gap/loss"] = scores["loss"] - self._evaluate(learner, self.gap)[0]["loss"]
        if learner.average.count(step):
            with learner.averaged():
                scores, calibration = self._evaluate(learner, self.val)
            record |= {f"val_average/{name}": value for name, value in scores.items()}
        if self.config.evaluation.sample_tokens:  # on every process: with sharded weights all take part in a pass
            tokens, seed = self.config.evaluation.sample_tokens, self.config.run.seed
            # Blocks that are compiled for themselves would be compiled anew for each length of the text.
            eager = torch.compiler.set_stance("force_eager") if learner.hardware.compiles_blocks else nullcontext()
            with eager:
                record["sample"] = sample_text(model, self.tokenizer, "", self.corpus.end_of_text, tokens, seed)
        self.calibration = calibration
        return Judgement(record, scores)

    def _evaluate(self, learner: Learner, parts: list[Part]) -> tuple[dict[str, float], Calibration]:
        return evaluate_parts(learner.model, parts, learner.hardware, forward=learner.forward)

    def test(self, learner: Learner, checkpoint: Path | None) -> dict[str, float]:
        """The scores of a verified checkpoint's best weights on the test split; empty where there is none of either."""
        if checkpoint is None or "test" not in self.corpus.split_names:
            return {}
        best = "average" if has_average(checkpoint) else "model"
        learner.load_weights(each_tensor(checkpoint, best), checkpoint)
        return self._evaluate(learner, parts_of(self.corpus.portions("test"), self._batches, None))[0]

    def draw(self, run: Run, only_if_due: bool = False) -> None:
        """The curves, the reliability diagram and the samples of the run, all made anew, if the disk has room.

        ``only_if_due``: only before a person's terminal, and half a minute after the last drawing.
        """
        due = sys.stdout.isatty() and time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES
        if not run.hardware.main or (only_if_due and not due):
            return
        records, path = run.records, run.path
        samples = [f"=== step {record['step']} ===\n{record['sample']}\n" for record in records if "sample" in record]
        try:
            write_text(path / "samples.txt", "\n".join(samples))
            pictures.curves(records, path / "curves.png", path.name, diagnose(records, self.config).headline)
            if self.calibration is not None:
                pictures.reliability(self.calibration, path / "reliability.png", path.name)
        except OSError as problem:
            warn(f"no pictures this time: {problem}")
        self.drawn = time.monotonic()
