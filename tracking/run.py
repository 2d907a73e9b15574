"""One run at work in its directory: locked, resumed, recorded, saved, finished. Only the main process writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import files
from command_line import dump
from config import BadInput, Config
from data.loader import TrainingLoader
from data.shards import Corpus
from data.tokenizers import TOKENIZER_FILES
from hardware import Hardware, device_metrics, operations_per_token, peak_memory
from model.gpt import AUXILIARY
from program import FINISHED, PREEMPTED, warn
from regularizers.averaging import WeightAverage
from tracking import run_directory
from tracking.branch import Branch, checkpoint_to_branch_from, open_branch
from tracking.console import Console, evaluation_line, source_lines, tell_results, tell_start
from tracking.load_run import initial_weights
from tracking.metrics import Metrics, read_metrics, results_of
from tracking.profile import profiled
from tracking.saving import Saver, point_at
from tracking.teachers import check_unchanged, load_teachers
from tracking.weights_and_biases import Mirror, start_wandb
from training import checkpoint
from training.learner import Learner
from training.memory import largest_micro_batch_size
from training.optimizer import describe_groups
from training.processes import barrier, check_micro_batches, on_main
from training.progress import Judgement, Plan, Progress
from training.schedule import warmup_warning
from training.step import StepResult
from training.teachers import Teacher


class Run:
    """A run whose directory is ours while the block lasts.

    Entering it raises BadInput when another process has the directory, or when it holds a run of another config.
    Nothing in it is changed before ``begin``.
    """

    def __init__(self, config: Config, hardware: Hardware) -> None:
        self.config, self.hardware = config, hardware
        self.path = run_directory.path_of(config)
        self.checkpoints = self.path / "checkpoints"
        self.afresh = config.run.resume == "never"
        self.before: dict[str, Any] = {}  # summary.json as the last start left it
        self.warnings: list[str] = []
        self.saver = Saver(self.path, config, hardware, lambda: self.metrics.sync())  # a resume counts on its lines
        self.branch: Branch | None = None  # of another run, if this one begins as that now
        self.seconds, self.steps_timed = 0.0, 0
        self._lock: TextIO | None = None

    def __enter__(self) -> Run:
        on_main(self.hardware, self._take_lock)
        try:
            if not self.afresh:
                self.warnings = on_main(self.hardware, run_directory.check_config, self.path, self.config)
                self.before = on_main(self.hardware, run_directory.read_summary, self.path)
        except Exception:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.saver.close()
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        self._lock = run_directory.lock(self.path)

    @property
    def finished(self) -> bool:
        """Whether the run was over before it was started this time."""
        return self.before.get("status") == "finished"

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, on the main process."""
        return self.metrics.records if self.hardware.main else []

    def settled(self, corpus: Corpus) -> Config:
        """The run's config, in which training.micro_batch_size is the number that ``auto`` comes to, or null.

        Raises BadInput when the run was trained on other text, or other tokens of it, or when its micro-batches cannot
        be shared by so many processes.
        """
        before = self.before.get("corpus", corpus.fingerprint)
        if before != corpus.fingerprint:
            raise BadInput(
                f"{self.path} was trained on the corpus {before}, and the data now give {corpus.fingerprint}; "
                "restore the data, use another --run.name, or --run.resume=never"
            )
        if not isinstance(self.config.training.micro_batch_size, int):
            size = on_main(self.hardware, self._micro_batch_size, corpus.vocab_size)
            training = self.config.training.model_copy(update={"micro_batch_size": size})
            self.config = self.config.model_copy(update={"training": training})
        return self.config

    def _micro_batch_size(self, vocab_size: int) -> int:
        """The one with which the run began, if the processes can share it, else the largest that fits.

        Without auto a run that has begun is not changed: its masks are drawn for each micro-batch.
        """
        fitting, auto = self.config.training.micro_sizes(self.hardware.world), self.config.training.micro_batch_size
        if not self.afresh and checkpoint.existing(self.checkpoints):
            stored = run_directory.read_config(self.path).training.micro_size
            if stored in fitting:
                return stored
            if auto is None:
                training = self.config.training.model_copy(update={"micro_batch_size": stored})
                check_micro_batches(self.config.model_copy(update={"training": training}), self.hardware.world)
        if auto is None:
            return max(fitting)
        size = largest_micro_batch_size(self.config, self.hardware, vocab_size)
        print(f"micro-batch {size} sequences at once, for the memory of {self.hardware.device}")
        return size

    def teachers(self, corpus: Corpus) -> list[Teacher]:
        """The models of run.teachers; raises BadInput when they cannot teach it, or are not those it began with."""
        teachers, warnings = load_teachers(self.config, corpus, self.hardware.device)
        check_unchanged(self.before.get("teachers", []), teachers, self.path)
        self.warnings += warnings
        return teachers

    def tell_again(self, diagnose: Callable[[list[dict[str, Any]]], str]) -> int:
        """Tell the results of a run that is finished already; returns the exit code."""
        if self.hardware.main:
            records = read_metrics(self.path)
            tell_results(self.path, self.before, records, diagnose(records), again=True)
        return FINISHED

    def resume(self, learner: Learner, corpus: Corpus) -> Progress:
        """Load the newest checkpoint that verifies, else what run.branch_from or run.init_from names."""
        self.hardware = learner.hardware
        step = None
        if not self.afresh:
            step, damaged = on_main(self.hardware, checkpoint.newest, self.checkpoints)
            self.warnings += damaged
        progress = Progress()
        if step is not None:
            found = checkpoint.directory_for(self.checkpoints, step)
            progress = Progress.resumed(checkpoint.read_state(found), self.config, found)
            learner.load(found, step, progress.average_from)
        elif self.config.run.branch_from is not None:
            progress = self._begin_branch(learner, corpus)
        elif self.config.run.init_from is not None:
            vocabulary = corpus.vocab_size, corpus.tokenizer()
            weights = initial_weights(self.config.run.init_from, self.config.model, *vocabulary)
            # What regularizers train beside the network begins anew.
            whole = {name: learner.layout.whole(name, part) for name, part in learner.layout.weights.items()}
            own = {name: value for name, value in whole.items() if name.startswith(AUXILIARY)}
            learner.load_weights((own | weights).items(), Path(self.config.run.init_from))
        progress.samples *= self.hardware.main  # what was trained on so far counts once
        self.saver.best = progress.best
        self.attempt = on_main(
            self.hardware, run_directory.count_attempt, self.before, progress.step, self.config.training.max_attempts
        )
        return progress

    def _begin_branch(self, learner: Learner, corpus: Corpus) -> Progress:
        """Load weights, moments and progress of the checkpoint that run.branch_from names."""
        found = Path(on_main(self.hardware, checkpoint_to_branch_from, self.config))
        self.branch = open_branch(found, self.config, corpus, learner.total_steps)
        theirs = WeightAverage(self.branch.config.regularizers, self.branch.total_steps)
        goes_on = learner.average.goes_on(theirs)
        progress = Progress.branched(checkpoint.read_state(found), self.config, goes_on, found)
        learner.load(found, progress.step, progress.average_from)
        return progress

    def begin(self, progress: Progress, learner: Learner, corpus: Corpus, plan: Plan, loader: TrainingLoader) -> None:
        """From here on the directory is written to; a branch saves where it begins, and needs the other run no more."""
        if self.hardware.main:
            self._open(progress, learner, corpus, plan, loader)
        if self.branch is not None:
            self.save(progress, learner, plan)

    def _open(self, progress: Progress, learner: Learner, corpus: Corpus, plan: Plan, loader: TrainingLoader) -> None:
        """Tell what begins, in files and on the screen."""
        if self.afresh and run_directory.move_aside(self.path):
            held, self._lock = self._lock, run_directory.lock(self.path)
            assert held is not None
            held.close()
        files.write_text(self.path / "config.yaml", dump(self.config))
        checkpoint.sweep(self.checkpoints)
        for debris in self.path.glob(".*.new"):  # of a killed write
            debris.unlink(missing_ok=True)
        if progress.step and self.branch is None:
            checkpoint.set_aside_newer(self.checkpoints, progress.step)
            point_at(self.path, progress)
        hardware, versions = self.hardware.describe(), run_directory.versions()
        self.warnings += warmup_warning(self.config.schedule, plan.total_steps)
        self.warnings += plan.milestones_out_of_reach()
        self.warnings += run_directory.bits_may_differ(self.before.get("versions", {}), versions)
        self.warnings += run_directory.bits_may_differ(self.before.get("hardware", {}), hardware)
        for warning in self.warnings:
            warn(warning)
        for name in TOKENIZER_FILES:  # kept, so that a run can be moved or exported alone
            if (corpus.directory / name).exists() and not (self.path / name).exists():
                with files.replacing(self.path / name) as temporary:
                    shutil.copyfile(corpus.directory / name, temporary)
        parameters, model = learner.model.count_parameters(), self.config.model
        self.operations = operations_per_token(parameters, model.n_layers, model.d_model, model.context_length)
        self.update_summary(
            status="running",
            error=None,
            process=os.getpid(),
            attempt=self.attempt,
            hardware=hardware,
            versions=self.before.get("versions") or versions,
            corpus=corpus.fingerprint,
            corpus_directory=str(corpus.directory),
            sources=[
                source.model_dump() | {"corpus": one.fingerprint, "corpus_directory": str(one.directory)}
                for source, one in corpus.sources
            ],
            tokenizer=corpus.manifest["tokenizer"]["sha256"],
            parameters=parameters,
            total_steps=plan.total_steps,
            branch=self.branch.described if self.branch else self.before.get("branch"),
            teachers=[teacher.described for teacher in learner.teachers],
        )
        text = "a mixture" if corpus.sources else str(corpus.directory)
        text += f", {loader.n_tokens:,} training tokens"
        length = f"{plan.total_steps:,} steps, {plan.epoch_at(plan.total_steps):,.2f} epochs"
        tell_start(self.path, progress.step, text, length, self.config, hardware)
        val_tokens = sum(portion.split.n_tokens for portion in corpus.portions("val"))
        print(evaluation_line(self.config, plan.evaluation_every, val_tokens))
        lines = describe_groups(learner.optimizers, self.config.regularizers, plan.steps_per_epoch)
        lines += source_lines(corpus, loader, plan.total_steps)
        lines += [f"teacher    {one.described['checkpoint']}, {one.share:.0%} of the mean" for one in learner.teachers]
        print("\n".join([*lines, *(self.branch.lines() if self.branch else [])]), flush=True)
        self.metrics = Metrics(self.path, progress.step)
        self.console = Console(progress.step, plan.total_steps)
        self.mirror = Mirror(start_wandb(self.path, self.config))

    def update_summary(self, **values: Any) -> dict[str, Any]:
        """Write ``values`` into summary.json; returns the whole of it."""
        return run_directory.update_summary(self.path, **values)

    def profiled(self) -> AbstractContextManager[Callable[[], None]]:
        """A block whose run.profile steps the main process traces; it gives what is to be called after each step."""
        return profiled(self.config.run.profile if self.hardware.main else 0, self.path / "profile.json")

    def failed(self, error: str) -> None:
        """Record what this start of the run ends with."""
        if self.hardware.main:
            self.update_summary(status="failed", error=error)

    def log(self, progress: Progress, result: StepResult, plan: Plan, judgement: Judgement | None) -> None:
        """Record a step: each tracking.log_every-th, the first, the last, each spike, and each that was evaluated."""
        if not self.hardware.main:
            return
        step, record = progress.step, dict[str, Any]()
        self.seconds, self.steps_timed = self.seconds + result.seconds, self.steps_timed + 1
        if not result.is_finite:
            how_often = f"({progress.nonfinite} in a row)"
            if result.loss_scale is not None:
                how_often = f"(fp16, loss scale {result.loss_scale:g}, now {progress.loss_scale:g})"
            warn(f"step {step}: the gradient is not finite; the step is skipped {how_often}")
        if result.is_spike:
            warn(f"step {step}: the objective jumped to {result.terms['objective']:.4g}")
        if step % self.config.tracking.log_every == 0 or step in (1, plan.total_steps) or result.is_spike:
            record = {f"train/{name}": value for name, value in result.terms.items()}
            record |= {"train/spikes": progress.spikes} if progress.spikes else {}
            record["train/grad_norm"] = result.gradient_norm
            record["train/lr"] = result.learning_rate
            speed = record["train/tokens_per_second"] = self.steps_timed * self.config.tokens_per_step / self.seconds
            record |= device_metrics(self.hardware, speed, self.operations)
            self.seconds, self.steps_timed = 0.0, 0
        if judgement is not None:
            record |= judgement.record
        if record:
            when = {"step": step, "tokens": progress.tokens, "epoch": plan.epoch_at(step)}
            record = self.metrics.append(when | record)
            self.mirror.log(record)
            self.console.tell(record)

    def save(self, progress: Progress, learner: Learner, plan: Plan) -> None:
        """Commit a checkpoint (see ``Saver.save``)."""
        self.saver.save(progress, learner, plan)

    def best_checkpoint(self, progress: Progress) -> Path | None:
        """The checkpoint to test and to use, verified; None without one, which is told."""
        if progress.best is None:
            return None
        path = checkpoint.directory_for(self.checkpoints, progress.best["step"])
        problem = on_main(self.hardware, checkpoint.problem_of, path)
        if problem and self.hardware.main:
            warn(f"there is no test: the best checkpoint cannot be trusted ({problem})")
        return None if problem else path

    def finish(self, progress: Progress, learner: Learner, plan: Plan, test: dict[str, float], diagnosis: Any) -> int:
        """Write the summary and tell the results; returns the exit code. ``diagnosis`` is evaluation.diagnosis's."""
        finished = progress.finished(plan)
        code = FINISHED if finished else PREEMPTED
        small = learner.sparsity() if self.config.regularizers.l1 else None
        if self.hardware.main:
            self.console.close()
            self.metrics.close()
            summary = self.update_summary(
                status="finished" if finished else "preempted",
                steps=progress.step,
                tokens=progress.tokens,
                samples=f"{progress.samples:016x}",
                stopped_early=progress.stopped_early,
                peak_memory_bytes=peak_memory(self.hardware.device),
                diagnosis=diagnosis.verdict,
                sparsity=small,
                held_bytes=learner.held_bytes(),
                **results_of(self.metrics.records, progress.best, test),
            )
            self.mirror.finish(summary, exit_code=code)
            tell_results(self.path, summary, self.metrics.records, diagnosis.text(), again=False)
        barrier(self.hardware)
        return code
