"""Pretrain one model: python train.py [config.yaml ...] [--section.key=value ...]

One run, top to bottom: config -> corpus -> batch -> model -> objective -> step -> record. Start it again with the
same words and it goes on where it was; start it under torchrun and it trains the same model on all processes.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

from command_line import FINISHED, PREEMPTED, parse, run
from config import BadInput, Config, Failure


def main(arguments: list[str]) -> int:
    """One run; returns the exit code."""
    config = parse(arguments, __doc__ or "")
    import_torch()
    from training import distributed
    from training.run_directory import path_of, read_summary, update_summary

    directory = path_of(config)
    stored = read_summary(directory) if config.run.resume == "auto" else {}
    hardware = distributed.start(config.run, stored.get("hardware"), config.training.hang_timeout)
    distributed.check_micro_batches(config, hardware.world)
    try:
        code = train(config, directory, hardware)
    except Exception as problem:
        # Another process may have been the first to fail: then this one names it instead of its own lost connection.
        blamed = distributed.explain(problem, hardware)
        own = read_summary(directory).get("process") == os.getpid()  # else it was refused, and the summary is another's
        if hardware.main and own and not isinstance(problem, BadInput):
            update_summary(directory, status="failed", error=str(blamed or f"{type(problem).__name__}: {problem}"))
        if blamed and not hardware.main:
            print(f"rank {hardware.rank}: {blamed}", file=sys.stderr)
        raise blamed or problem from None
    distributed.stop()
    return code


def train(config: Config, directory: Path, hardware: Any) -> int:
    """Prepare, then step after step until the run is done, told to stop, or fails."""
    import torch

    from data.loader import EvaluationBatches, TrainingLoader, evaluation_batches, fingerprint
    from data.prepare import prepare
    from data.shards import Corpus, Split
    from model.generate import sample_text
    from model.gpt import GPT
    from regularizers.averaging import WeightAverage
    from regularizers.stopping import patience_is_over
    from regularizers.weights import add_penalty_gradients, sparsity, weight_decay_at
    from training import checkpoint, distributed, run_directory
    from training.diagnosis import diagnose
    from training.evaluation import evaluate, plain_loss
    from training.faults import strike
    from training.gradients import GradientSum
    from training.load_run import initial_weights, read_weights
    from training.optimizer import (
        build_optimizers,
        clip_gradients,
        decayed_parameters,
        describe_groups,
        load_optimizer_state,
        optimizer_state,
        set_learning_rate,
        set_weight_decay,
    )
    from training.schedule import learning_rate_ratio, warmup_warning
    from training.spikes import is_spike
    from training.step import differentiate
    from training.tracking import Metrics, draw, results_of, tell_results, tell_start

    # ---------------------------------------------------------------- the run's directory, ours alone
    # Nothing is written or moved before config, corpus and first weights are known to be good.
    fresh = config.run.resume == "never"
    lock: list[Any] = []
    distributed.on_main(hardware, lambda: lock.append(run_directory.lock(directory)))
    warnings: list[str] = []
    before: dict[str, Any] = {}
    if not fresh:
        warnings = distributed.on_main(hardware, lambda: run_directory.check_config(directory, config))
        before = distributed.on_main(hardware, lambda: run_directory.read_summary(directory))
    if before.get("status") == "finished":
        if hardware.main:
            tell_results(directory, config, before, again=True)
        return FINISHED

    # ---------------------------------------------------------------- corpus
    # Every process calls it: one prepares, the others wait for its file lock, for which there is no timeout.
    corpus = Corpus.open(prepare(config.data, quiet=not hardware.main), verify=hardware.main)
    if before.get("corpus", corpus.fingerprint) != corpus.fingerprint:
        raise BadInput(
            f"{directory} was trained on the corpus {before['corpus']}, and the data now give {corpus.fingerprint}; "
            "restore the data, use another --run.name, or --run.resume=never"
        )
    training, evaluation, context = config.training, config.evaluation, config.model.context_length
    regularizers, seed = config.regularizers, config.run.seed
    val_split = corpus.split("val")
    loader = TrainingLoader(corpus.split("train"), config.data, seed, context, training.global_batch_size)

    def batches_of(split: Split, max_tokens: int | None) -> EvaluationBatches:
        return evaluation_batches(split, context, training.micro_size, max_tokens, config.data.isolate_documents)

    val_batches = batches_of(val_split, evaluation.max_tokens)
    gap_batches = batches_of(loader.split, min(evaluation.max_tokens or val_split.n_tokens, val_split.n_tokens))
    bytes_per_token = corpus.bytes_per_token(val_split, evaluation.max_tokens)
    total_steps = training.max_steps or max(1, round((training.max_epochs or 1) * loader.steps_per_epoch))
    warnings += warmup_warning(config.schedule, total_steps)

    def evaluation_is_due(step: int) -> bool:
        if evaluation.every == "epoch":
            return int(loader.epoch_at(step)) > int(loader.epoch_at(step - 1))
        return step % (evaluation.every or max(1, total_steps // 10)) == 0

    targets_in_step = training.global_batch_size * context

    # ---------------------------------------------------------------- model and optimizer
    model = GPT(config.model, corpus.vocab_size, config.regularizers).initialize(seed)
    model.to(hardware.device)
    stored = before.get("hardware", {})
    hardware = distributed.decide_compile(hardware, config, stored, model.count_parameters(), total_steps)
    optimizers = build_optimizers(model, config)
    average = WeightAverage(regularizers, total_steps)
    gradients = GradientSum(model, hardware, training.micro_batches, training.deterministic == "strict")
    forward = torch.compile(model, dynamic=False) if hardware.compile else model

    # ---------------------------------------------------------------- resume
    checkpoints = directory / "checkpoints"
    step, best, nonfinite, failed_saves = 0, None, 0, 0
    val_losses: list[float] = []  # what early stopping judges by
    losses: list[float] = []  # of the last steps, by which a spike is told
    spikes, samples = 0, 0  # how many; a fingerprint of all samples trained on, this process's share of it
    found, damaged = None, []
    if not fresh:
        found, damaged = distributed.on_main(hardware, lambda: checkpoint.find_newest(checkpoints))
    if not found and config.run.init_from is not None:
        model.load_state_dict(
            initial_weights(config.run.init_from, config.model, corpus.vocab_size, corpus.tokenizer())
        )
    if found:
        newest = Path(found)
        checkpoint.load_weights(model, newest)
        load_optimizer_state(optimizers, checkpoint.read_tensors(newest, "optimizer"))
        state = checkpoint.read_state(newest)
        step, best, nonfinite, val_losses = state["step"], state["best"], state["nonfinite"], state["val_losses"]
        losses, spikes, samples = state["losses"], state["spikes"], state["samples"] if hardware.main else 0
        if state["average_count"]:
            average.load(checkpoint.read_tensors(newest, "average"), state["average_count"], model)
    attempt = distributed.on_main(hardware, lambda: run_directory.count_attempt(before, step, training.max_attempts))
    # ---------------------------------------------------------------- signals: finish the step, save, leave
    told_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop_after_this_step(number, told_to_stop))

    # ---------------------------------------------------------------- from here on the run is written to
    if hardware.main:
        if fresh:
            lock.pop().close()
            run_directory.move_aside(directory)
            lock.append(run_directory.lock(directory))
        run_directory.write_config(directory, config)
        checkpoint.sweep(checkpoints)
        if found:
            checkpoint.set_aside_newer(checkpoints, step)
            run_directory.point_at(directory, step, best)
        warnings += damaged + run_directory.version_warnings(before.get("versions", {}))
        for warning in warnings + run_directory.hardware_warnings(stored, hardware.describe()):
            run_directory.say(warning)
        run_directory.copy_tokenizer(directory, corpus.directory)
        run_directory.update_summary(
            directory,
            status="running",
            error=None,
            process=os.getpid(),
            attempt=attempt,
            hardware=hardware.describe(),
            versions=before.get("versions") or run_directory.versions(),
            corpus=corpus.fingerprint,
            corpus_directory=str(corpus.directory),
            tokenizer=corpus.manifest["tokenizer"]["sha256"],
            parameters=model.count_parameters(),
            total_steps=total_steps,
        )
        length = f"{total_steps:,} steps, {loader.epoch_at(total_steps):,.2f} epochs"
        tell_start(directory, step, corpus.directory, loader.split.n_tokens, length, config, hardware.describe())
        print("\n".join(describe_groups(optimizers)), flush=True)
    metrics = Metrics(directory, config, step, total_steps) if hardware.main else None

    # ---------------------------------------------------------------- steps
    model.train()
    tokenizer = corpus.tokenizer()
    mine = distributed.my_micro_batches(hardware, training.micro_batches)
    batches = loader.batches(range(step, total_steps), mine, training.micro_size, hardware.device)
    batch: Any = next(batches, None)
    seconds, steps_timed = 0.0, 0
    stopped_early = patience_is_over(val_losses, regularizers)
    while step < total_steps and not stopped_early:
        started = time.perf_counter()
        ratio = learning_rate_ratio(config.schedule, step, total_steps)
        set_learning_rate(optimizers, ratio)
        set_weight_decay(optimizers, weight_decay_at(regularizers, step, total_steps))
        for micro_batch in mine:
            first = step * training.global_batch_size + micro_batch * training.micro_size
            samples += fingerprint(first, batch.sample_ids_B)
            place = (seed, step, micro_batch)  # all that the randomness of this micro-batch depends on
            terms = differentiate(batch, place, model, forward, config, targets_in_step, hardware)
            strike("gradient", step + 1, chain(terms.values(), (weight.grad for weight in model.parameters())))
            # What is summed along with the gradients: the loss terms, and whether this process was told to stop.
            told = terms["objective"].new_full((), bool(told_to_stop))
            gradients.add(micro_batch, torch.stack([*(terms[name].detach() for name in sorted(terms)), told]))
            batch = next(batches, None)  # the next one, while a GPU still computes: nothing has waited for it yet
        sums_N = gradients.total()
        add_penalty_gradients(decayed_parameters(optimizers).values(), regularizers)
        norm = clip_gradients(model, config.optimizer.grad_clip)
        gradient_norm, *sums, stop_votes = torch.cat([norm[None], sums_N]).tolist()  # the step's only synchronisation
        step_terms = dict(zip(sorted(terms), sums, strict=True))

        # A gradient that is not finite changes nothing, on no process: it is summed, so all see the same.
        if math.isfinite(gradient_norm):
            for optimizer in optimizers:
                optimizer.step()
            nonfinite = 0
        else:
            nonfinite += 1
            if hardware.main:
                words = f"the gradient is not finite; the step is skipped ({nonfinite} in a row)"
                run_directory.say(f"step {step + 1}: {words}")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(model, step)
        strike("weights", step, model.parameters())
        seconds, steps_timed = seconds + time.perf_counter() - started, steps_timed + 1

        # ------------------------------------------------------------ record
        if nonfinite >= training.max_nonfinite:
            raise Failure(
                f"step {step}: the gradient was not finite {nonfinite} times in a row; lower optimizer.lr, "
                "and start again to go on from the last checkpoint"
            )
        last, stopping = step == total_steps, stop_votes > 0
        record: dict[str, Any] = {}
        spike = is_spike(step_terms["objective"], losses)
        if spike:
            spikes += 1
            if hardware.main:
                run_directory.say(f"step {step}: the objective jumped to {step_terms['objective']:.4g}")
        if step % config.tracking.log_every == 0 or step == 1 or last or spike:
            record = {f"train/{name}": value for name, value in step_terms.items()}
            record |= {"train/spikes": spikes} if spikes else {}
            record["train/grad_norm"] = gradient_norm
            record["train/lr"] = config.optimizer.lr * ratio
            record["train/tokens_per_second"] = steps_timed * targets_in_step / seconds
            seconds, steps_timed = 0.0, 0
        evaluated = evaluation_is_due(step) or last
        if evaluated:
            strike("evaluate", step)
            results, calibration = evaluate(model, val_batches, hardware, bytes_per_token)
            record |= {f"val/{name}": value for name, value in results.items()}
            record["gap/loss"] = results["loss"] - plain_loss(model, gap_batches, hardware)
            if average.count:
                with average.in_place_of(model):
                    results, calibration = evaluate(model, val_batches, hardware, bytes_per_token)
                record |= {f"val_average/{name}": value for name, value in results.items()}
            val_losses.append(results["loss"])
            best_saved = best
            if math.isfinite(results["loss"]) and (best is None or results["loss"] < best["val/loss"]):
                best = {"step": step, "val/loss": results["loss"], "val/bits_per_byte": results["bits_per_byte"]}
            stopped_early = patience_is_over(val_losses, regularizers)
            last = last or stopped_early
            if hardware.main and evaluation.sample_tokens:
                record["sample"] = sample_text(model, tokenizer, "", corpus.end_of_text, evaluation.sample_tokens, seed)
        if record and metrics is not None:
            where = {"step": step, "tokens": step * targets_in_step, "epoch": loader.epoch_at(step)}
            metrics.log(where | record)
            if evaluated:
                draw(directory, metrics.records, config, calibration)

        # ------------------------------------------------------------ save
        improved = evaluated and best is not None and best["step"] == step
        due = step % config.checkpoint.every == 0 if config.checkpoint.every else evaluated
        if due or improved or last or stopping:
            distributed.check_weights(model, step, hardware)
            shares = distributed.gathered(torch.tensor([samples % 2**62], device=hardware.device), hardware)
            tensors = {"model": model.state_dict(), "optimizer": optimizer_state(optimizers)}
            if average.count:
                tensors["average"] = average.weights
            state = {"best": best, "nonfinite": nonfinite, "val_losses": val_losses, "losses": losses}
            state |= {"spikes": spikes, "samples": sum(shares.flatten().tolist()) % 2**62}
            state |= {"average_count": average.count, "tokens": step * targets_in_step}
            refused = distributed.refused_on_main(
                hardware, run_directory.save, directory, step, tensors, state, config.checkpoint.keep, metrics
            )
            failed_saves = failed_saves + 1 if refused else 0
            if refused and improved:
                best = best_saved  # whose weights are on the disk
            if refused and (failed_saves >= training.max_failed_saves or last or stopping):
                raise Failure(f"step {step}: {refused}; make room and start again to go on from the last checkpoint")
            if refused and hardware.main:
                run_directory.say(f"step {step}: {refused}; training goes on ({failed_saves} failed in a row)")
        if last or stopping:
            break

    # ---------------------------------------------------------------- the end
    status, code = "finished", FINISHED
    if step < total_steps and not stopped_early:
        status, code = "preempted", PREEMPTED
    test: dict[str, float] = {}
    if status == "finished" and best is not None and "test" in corpus.manifest["splits"]:
        test_split = corpus.split("test")
        chosen = checkpoint.directory_for(checkpoints, best["step"])
        problem = distributed.on_main(hardware, lambda: checkpoint.problem_of(chosen))
        if problem is None:
            model.load_state_dict(read_weights(chosen))
            test, _ = evaluate(model, batches_of(test_split, None), hardware, corpus.bytes_per_token(test_split))
        elif hardware.main:
            run_directory.say(f"there is no test: the best checkpoint cannot be trusted ({problem})")
    if metrics is not None:
        summary = run_directory.update_summary(
            directory,
            status=status,
            steps=step,
            tokens=step * targets_in_step,
            samples=f"{state['samples']:016x}",
            stopped_early=stopped_early,
            diagnosis=diagnose(metrics.records, config).verdict,
            sparsity=sparsity(decayed_parameters(optimizers)) if regularizers.l1 else None,
            **results_of(metrics.records, best, test),
        )
        metrics.finish(summary, exit_code=code)
        tell_results(directory, config, summary, again=False)
    distributed.barrier(hardware)
    for held in lock:
        held.close()
    return code


def stop_after_this_step(number: int, told_to_stop: list[int]) -> None:
    """What a signal does: ask the loop to save and leave; a second Ctrl-C leaves at once, without saving."""
    if number == signal.SIGINT and told_to_stop:
        raise KeyboardInterrupt
    told_to_stop.append(number)
    if os.environ.get("RANK", "0") == "0":
        print("\nstopping after this step; its checkpoint is saved", flush=True)


def import_torch() -> None:
    """Import torch with its settings in place; signals wait, for one that struck in its C++ part would abort us."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    import torch  # noqa: F401

    signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    run(main)
