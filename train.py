"""Pretrain one model: python train.py [config.yaml ...] [--section.key=value ...]

One run, top to bottom: config -> corpus -> batch -> model -> objective -> step -> record. Start it again with the
same words and it goes on where it was; start it under torchrun and it trains the same model on all processes.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import scripts as scripts  # first of all it says when another Python than the project's is used
from command_line import parse
from config import BadInput, Config
from program import import_torch, run

if TYPE_CHECKING:
    from hardware import Hardware


def main(arguments: list[str]) -> int:
    """One run; returns the exit code."""
    config = parse(arguments, __doc__ or "")
    import_torch()
    from hardware import resolve
    from tracking.run_directory import path_of, read_summary, update_summary
    from training.failures import explain, out_of_memory
    from training.processes import check_micro_batches, join, leave

    directory = path_of(config)
    stored = read_summary(directory) if config.run.resume == "auto" else {}
    hardware = resolve(config.run, stored.get("hardware"), fast=config.training.deterministic == "fast")
    hardware = join(hardware, config.training.hang_timeout)
    check_micro_batches(config, hardware.world)
    try:
        code = train(config, hardware)
    except Exception as raised:
        problem = out_of_memory(raised, config, hardware) or raised
        # Another process may have been the first to fail: then this one names it instead of its own lost connection.
        blamed = explain(problem, hardware)
        own = read_summary(directory).get("process") == os.getpid()  # else it was refused, and the summary is another's
        if hardware.main and own and not isinstance(problem, BadInput):
            update_summary(directory, status="failed", error=str(blamed or f"{type(problem).__name__}: {problem}"))
        if blamed and not hardware.main:
            print(f"rank {hardware.rank}: {blamed}", file=sys.stderr)
        raise blamed or problem from None
    leave()
    return code


def train(config: Config, hardware: Hardware) -> int:
    """Prepare, then step after step until the run is done, told to stop, or fails; returns the exit code."""
    from data.loader import TrainingLoader
    from data.mixtures import open_data
    from evaluation.diagnosis import diagnose
    from evaluation.judge import Judge
    from hardware import resolve_compile
    from tracking.run import Run
    from training.heartbeat import watched
    from training.learner import Learner
    from training.memory import build
    from training.processes import main_first
    from training.progress import Plan
    from training.signals import StopSignals
    from training.step import training_step

    with Run(config, hardware) as run:
        if run.finished:
            return run.tell_again(lambda records: diagnose(records, config).text())

        # One process prepares the corpus, if it is not there yet; then the others open it.
        corpus = main_first(hardware, lambda main: open_data(config.data, quiet=not main, verify=main))
        config = run.settled(corpus)
        sizes = config.model.context_length, config.training.global_batch_size
        loader = TrainingLoader(corpus.portions("train"), config.data, config.run.seed, *sizes)
        plan = Plan.of(config, loader)

        model = build(config, hardware, corpus.vocab_size, plan.total_steps)
        sizes = model.count_parameters(), plan.total_steps
        hardware = resolve_compile(hardware, config, run.before.get("hardware", {}), *sizes)
        teachers = run.teachers(corpus)
        learner = Learner(model, config, hardware, plan.total_steps, loader.steps_per_epoch, teachers)
        judge = Judge(corpus, loader.splits, config)
        progress = run.resume(learner, corpus)

        with StopSignals() as signals, watched(learner, run.failed), run.profiled() as step_is_done:
            batches = loader.batches(
                range(progress.step, plan.total_steps),
                learner.micro_batches,
                config.training.micro_size,
                hardware.device,
            )
            run.begin(progress, learner, corpus, plan, loader)
            while not progress.over(plan):
                result = training_step(learner, batches, progress.step, signals, progress.loss_scale, run.saver.due)
                step_is_done()
                progress.count(result, config)
                judgement = judge(learner, progress.step) if plan.evaluates_at(progress.step) else None
                if judgement is not None:
                    progress.judge(judgement, config)
                run.log(progress, result, plan, judgement)
                judge.draw(run, only_if_due=True)
                if plan.saves_at(progress):
                    run.save(progress, learner, plan)

            judge.draw(run)
            test = judge.test(learner, run.best_checkpoint(progress)) if progress.finished(plan) else {}
            return run.finish(progress, learner, plan, test, diagnose(run.records, config))


if __name__ == "__main__":
    run(main)
