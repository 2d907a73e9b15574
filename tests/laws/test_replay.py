"""A real run, replayed by a second program: a plain loop in float64, the formulas of the papers, torch's autograd.

The replay takes from the code under test the network, its initial weights, the batches of each step, and the random
numbers that are drawn for a key of (seed, step, micro-batch). Objective, penalties, clipping, AdamW, schedules,
averages and evaluation are written out below, so that a run whose parts are right and whose wiring is wrong fails.

Precision: the run is fp32, whose numbers are rounded by 6e-8 of themselves. A number of metrics.jsonl agrees within
3e-6 of itself (the farthest was off by 6e-7), a weight within 3e-6 and 1e-5 of itself (4e-7). AdamW's eps is 1e-4 here,
because AdamW magnifies the rounding of gradients that are smaller than eps. The gradient of L1 jumps where a weight
crosses 0, so a weight that comes as near to 0 as its rounding may end elsewhere: 30 of 70,000 numbers may.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from command_line import parse
from config import Config, Points
from data.loader import Batch, TrainingLoader
from data.shards import Corpus, Split
from model.gpt import GPT
from randomness import numpy_generator, seed_activations, torch_generator
from tracking.load_run import load_model
from tracking.metrics import read_metrics
from training.checkpoint import existing, read_tensors

Train = Callable[..., subprocess.CompletedProcess[str]]
Weights = dict[str, Tensor]
Kind = tuple[bool, int]

COMMON = {
    "training__max_steps": 12,
    "training__micro_batch_size": 4,
    "evaluation__every": 3,
    "evaluation__max_tokens": 500,
    "evaluation__sample_tokens": 0,
    "tracking__log_every": 1,
    "optimizer__eps": 1e-4,
}
RUNS = {
    "everything": COMMON
    | {
        "model__family": "gpt2",
        "optimizer__grad_clip": 2.2,
        "optimizer__lr": 1e-2,
        "schedule__warmup_steps": 3,
        "regularizers__embedding_dropout": 0.1,
        "regularizers__attention_dropout": 0.1,
        "regularizers__residual_dropout": 0.1,
        "regularizers__mlp_dropout": 0.1,
        "regularizers__stochastic_depth": 0.2,
        "regularizers__token_dropout": 0.1,
        "regularizers__token_replacement": 0.1,
        "regularizers__embedding_noise": 5.0,
        "regularizers__mixup_alpha": 0.4,
        "regularizers__reversed_fraction": 0.4,
        "regularizers__target_offset": 3,
        "regularizers__label_smoothing": 0.1,
        "regularizers__z_loss": 1e-2,
        "regularizers__entropy_penalty": 0.05,
        "regularizers__multi_token_weight": 0.3,
        "regularizers__masked_input_weight": 0.4,
        "regularizers__masked_input_rate": 0.8,
        "regularizers__weight_decay": 2.0,
        "regularizers__weight_decay_schedule": "cosine",
        "regularizers__weight_decay_end": 0.5,
        "regularizers__cautious_weight_decay": "true",
        "regularizers__dropout_from": 0.25,
        "regularizers__dropout_until": 0.75,
        "regularizers__l1": 1e-3,
        "regularizers__l2": 1e-2,
        "regularizers__ema_decay": 0.8,
    },
    "untied, strict, SWA": COMMON
    | {
        "model__family": "llama",
        "model__tie_embeddings": "false",
        "optimizer__grad_clip": 0,
        "optimizer__betas": "[0.8, 0.9]",
        "schedule__name": "wsd",
        "schedule__decay_fraction": 0.4,
        "schedule__warmup_steps": 2,
        "training__deterministic": "strict",
        "regularizers__weight_decay_epochs": 2.4,
        "regularizers__weight_decay_schedule": "linear",
        "regularizers__decay_embeddings": "false",
        "regularizers__swa_start": 0.5,
        "regularizers__swa_every": 2,
    },
    "points": COMMON
    | {
        "model__family": "gpt2",
        "optimizer__grad_clip": 0,
        "optimizer__lr": 1e-2,
        "schedule__name": "points",
        "schedule__points": "[[0,0.1],[0.3,1],[0.6,0.2],[0.6,0.9],[1,0.3]]",
        "regularizers__weight_decay_schedule": "[[0,1],[0.5,3],[1,0.5]]",
        "regularizers__dropout_until": 0.5,
        "regularizers__token_dropout": 0.1,
        "regularizers__mlp_dropout": 0.2,
        "regularizers__ema_decay": 0.8,
    },
    "distilled": COMMON
    | {
        "run__seed": 1,  # with seed 0 a residual stream almost cancels once, and float32 gives that gradient to 2e-5
        "model__family": "gpt2",
        "optimizer__grad_clip": 1.3,
        "optimizer__lr": 1e-2,
        "schedule__warmup_steps": 3,
        "regularizers__mlp_dropout": 0.1,
        "regularizers__token_replacement": 0.1,
        "regularizers__mixup_alpha": 0.4,
        "regularizers__label_smoothing": 0.1,
        "regularizers__z_loss": 1e-2,
        "regularizers__entropy_penalty": 0.05,
        "regularizers__distillation_weight": 0.4,
        "regularizers__distillation_temperature": 2.0,
        "regularizers__weight_decay_schedule": "linear",
        "regularizers__ema_decay": 0.8,
    },
}


@dataclass
class Changes:
    """What is done to the embeddings of a micro-batch, for the network to call: direction, noise, dropout, mixup."""

    masked_BT: Tensor
    kinds: list[Kind]
    noise_BTD: Tensor
    keep_BT: Tensor
    partner_B: Tensor
    share_B: Tensor

    def apply(self, x_BTD: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        if self.masked_BT.any():
            x_BTD = x_BTD * ~self.masked_BT[..., None] + vectors["mask"] * self.masked_BT[..., None]
        for row, (turned, offset) in enumerate(self.kinds):
            where = (torch.arange(len(x_BTD)) == row)[:, None, None]
            x_BTD = x_BTD + where * vectors["direction"] if turned else x_BTD
            x_BTD = x_BTD + where * vectors["offset"][offset - 2] if offset > 1 else x_BTD
        x_BTD = (x_BTD + self.noise_BTD) * self.keep_BT[..., None]
        return torch.stack(
            [share * x_BTD[row] + (1 - share) * x_BTD[self.partner_B[row]] for row, share in enumerate(self.share_B)]
        )


def dropout_acts(config: Config, step: int) -> bool:
    """Whether the step begins between the two fractions of the run."""
    fraction = step / (config.training.max_steps or 0)
    return config.regularizers.dropout_from <= fraction < config.regularizers.dropout_until


def readings(config: Config, step: int) -> list[Kind]:
    """For each sequence of a step whether it is read from right to left, and how many tokens ahead it predicts."""
    knobs, size, seed = config.regularizers, config.training.global_batch_size, config.run.seed
    turned = torch.rand(size, generator=torch_generator(seed, "reversed sequences", step)) < knobs.reversed_fraction
    draws = torch.rand(size, generator=torch_generator(seed, "target offset", step), dtype=torch.float64)
    odds = [math.exp(-offset) for offset in range(1, knobs.target_offset + 1)]
    below = [sum(odds[:count]) / sum(odds) for count in range(1, len(odds))]
    return [
        (bool(one), 1 + sum(draw >= bound for bound in below)) for one, draw in zip(turned, draws.tolist(), strict=True)
    ]


def as_read(batch: Batch, kinds: list[Kind]) -> Batch:
    """The batch with its sequences turned around and their targets so far ahead, 0 where there is none."""
    tokens_BT, targets_BT = batch.tokens_BT.clone(), batch.targets_BT.clone()
    for row, (turned, offset) in enumerate(kinds):
        window = [int(batch.tokens_BT[row, 0]), *batch.targets_BT[row].tolist()]
        window = window[::-1] if turned else window
        tokens_BT[row], targets_BT[row] = torch.tensor(window[:-1]), torch.tensor(window[offset:] + [0] * (offset - 1))
    return replace(batch, tokens_BT=tokens_BT, targets_BT=targets_BT)


def changed_inputs(
    batch: Batch, kinds: list[Kind], config: Config, key: tuple[int, int, int]
) -> tuple[Tensor, Changes]:
    """The ids with some replaced, and the changes of their embeddings; a knob that is off changes nothing."""
    knobs, (seed, *place) = config.regularizers, key
    token_dropout = knobs.token_dropout if dropout_acts(config, place[0]) else 0.0
    rows, time = batch.tokens_BT.shape
    width, vocabulary = config.model.d_model, 257
    generator = torch_generator(seed, "token replacement", *place)
    replaced_BT = torch.rand(rows, time, generator=generator) < knobs.token_replacement
    tokens_BT = torch.where(replaced_BT, torch.randint(vocabulary, (rows, time), generator=generator), batch.tokens_BT)
    generator = torch_generator(seed, "embedding noise", *place)
    noise_BTD = torch.empty(rows, time, width).uniform_(-1, 1, generator=generator).double()
    noise_BTD *= knobs.embedding_noise / math.sqrt(time * width)
    kept_BT = torch.rand(rows, time, generator=torch_generator(seed, "token dropout", *place)) >= token_dropout
    partner_B, share_B = torch.arange(rows), torch.ones(rows, dtype=torch.float64)
    if knobs.mixup_alpha:
        partner_B = torch.randperm(rows, generator=torch_generator(seed, "mixup partner", *place))
        draw = numpy_generator(seed, "mixup share", *place)
        share_B = torch.from_numpy(draw.beta(knobs.mixup_alpha, knobs.mixup_alpha, size=rows))
        for row, partner in enumerate(partner_B.tolist()):
            partner_B[row] = partner if kinds[row] == kinds[partner] else row
    return tokens_BT, Changes(
        torch.zeros(rows, time, dtype=torch.bool),
        kinds,
        noise_BTD,
        kept_BT.double() / (1 - token_dropout),
        partner_B,
        share_B,
    )


def divergence(logits_BTV: Tensor, batch: Batch, changes: Changes, config: Config) -> Tensor:
    """KL from the mean of the teachers to the student at the temperature, summed over tokens (Hinton 2015).

    The teachers read the batch as it is; the target of a mixture is the mixture of their predictions.
    """
    temperature = config.regularizers.distillation_temperature
    theirs_BTV = torch.zeros_like(logits_BTV)
    for path in config.run.teachers:
        teacher = load_model(path)[0].double()
        with torch.no_grad():
            odds_BTV = (teacher.logits(teacher(batch.tokens_BT)) / temperature).exp()
        p_BTV = odds_BTV / odds_BTV.sum(-1, keepdim=True) / len(config.run.teachers)
        share_B11 = changes.share_B[:, None, None]
        theirs_BTV += share_B11 * p_BTV + (1 - share_B11) * p_BTV[changes.partner_B]
    odds_BTV = (logits_BTV / temperature).exp()
    return (theirs_BTV * (theirs_BTV / (odds_BTV / odds_BTV.sum(-1, keepdim=True))).log()).sum()


def sums_of(
    model: GPT, batch: Batch, kinds: list[Kind], config: Config, key: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a micro-batch, summed over its tokens: the objective without those of a weight of their own, the plain
    cross-entropy of ordinary sequences, that of the token after next, and that of masked inputs.
    """
    knobs = config.regularizers
    batch = as_read(batch, kinds)
    tokens_BT, changes = changed_inputs(batch, kinds, config, key)
    seed_activations(*key)
    hidden_BTD = model(tokens_BT, changes=changes)  # type: ignore[arg-type]
    logits_BTV = model.logits(hidden_BTD)
    log_p_BTV = logits_BTV - logits_BTV.exp().sum(-1, keepdim=True).log()
    after_next = model.auxiliary["after_next"] if knobs.multi_token_weight else torch.eye(hidden_BTD.shape[-1]).double()
    log_p_after_BTV = model.logits(hidden_BTD @ after_next.T).log_softmax(-1)
    log_p_masked_BTV = log_p_BTV
    if knobs.masked_input_weight:
        generator = torch_generator(key[0], "masked inputs", *key[1:])
        rate_B1 = knobs.masked_input_rate * torch.rand(len(tokens_BT), 1, generator=generator)
        masked = replace(changes, masked_BT=torch.rand(tokens_BT.shape, generator=generator) < rate_B1)
        seed_activations(*key, purpose="activations of the masked pass")
        log_p_masked_BTV = model.logits(model(tokens_BT, changes=masked)).log_softmax(-1)  # type: ignore[arg-type]
    objective, regular, loss, second, again = (torch.zeros(()) for _ in range(5))
    for row, share in enumerate(changes.share_B):
        n = logits_BTV.shape[1] + 1 - kinds[row][1]
        others = (logits_BTV.shape[-1] - 1) / knobs.label_smoothing if knobs.label_smoothing else math.inf
        for weight, target_row in ((share, row), (1 - share, int(changes.partner_B[row]))):
            target_T1 = batch.targets_BT[target_row][:n, None]
            log_p_T = log_p_BTV[row][:n].gather(1, target_T1)[:, 0]
            rest_T = log_p_BTV[row][:n].sum(1) - log_p_T
            if kinds[row] == (False, 1):
                loss = loss - weight * log_p_T.sum()
            log_p_after = log_p_after_BTV[row][: n - 1].gather(1, target_T1[1:])
            second = second - weight * log_p_after.sum()
            again = again - weight * log_p_masked_BTV[row][:n].gather(1, target_T1).sum()
            objective = objective - weight * ((1 - knobs.label_smoothing) * log_p_T + rest_T / others).sum()
        regular = regular + knobs.z_loss * logits_BTV[row][:n].exp().sum(-1).log().square().sum()
        log_p_TV = log_p_BTV[row][:n]
        regular = regular + knobs.entropy_penalty * (log_p_TV.exp() * log_p_TV).sum()
    if alpha := knobs.distillation_weight:
        scale = alpha * knobs.distillation_temperature**2
        objective = (1 - alpha) * objective + scale * divergence(logits_BTV, batch, changes, config)
    return objective + regular, loss.detach(), second, again


def share_of_peak(config: Config, step: int) -> float:
    """Linear warmup to 1 at step ``warmup``; then half a cosine to the floor at the last step, or the end of WSD.

    Or along the points.
    """
    schedule, last = config.schedule, (config.training.max_steps or 0) - 1
    warmup, floor = schedule.warmup_steps or 0, schedule.min_lr_ratio
    if schedule.points:
        return along(schedule.points, step / last)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "wsd":  # level until decay_fraction of all steps are left before the last one
        return min(1.0, floor + (1 - floor) * (last - step) / (schedule.decay_fraction * (last + 1)))
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2


def along(points: Points, part: float) -> float:
    """The first value and, for each line, the share of its rise that lies before ``part``; a jump is a steep line."""
    value = points[0][1]
    for (start, low), (end, high) in pairwise(points):
        value += (high - low) * min(1.0, max(0.0, (part - start + 1e-12) / (end - start + 1e-12)))
    return value


def decay_at(config: Config, step: int, steps_per_epoch: float) -> float:
    """Weight decay on its way from the first value to the last, along a line or half a cosine; or along its points."""
    knobs, part = config.regularizers, step / ((config.training.max_steps or 0) - 1)
    if not isinstance(knobs.weight_decay_schedule, str):
        return along(knobs.weight_decay_schedule, part)
    first = knobs.weight_decay
    if knobs.weight_decay_epochs:  # the weights forget by a factor e in so many epochs
        first = 1 / knobs.weight_decay_epochs / steps_per_epoch / config.optimizer.lr
    if knobs.weight_decay_schedule == "cosine":
        part = (1 - math.cos(math.pi * part)) / 2
    return first + part * (knobs.weight_decay_end - first)


def loss_of(model: GPT, split: Split, config: Config) -> float:
    """Cross-entropy of the first 500 tokens of ``split``, each but the first a target, window by window."""
    model.eval()
    stream, time, total = torch.from_numpy(split.read(0, 500)), config.model.context_length, 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, time):
            window = stream[start : start + time + 1]
            log_p_TV = model.logits(model(window[None, :-1]))[0].log_softmax(-1)
            total -= log_p_TV.gather(1, window[1:, None]).sum().item()
    return total / (len(stream) - 1)


def replay(config: Config, corpus: Corpus) -> tuple[list[dict[str, float]], Weights, Weights]:
    """The run of ``config``: a record for each step, the final weights, and their average (empty without one)."""
    knobs, training, seed = config.regularizers, config.training, config.run.seed
    size, total, time = training.micro_size, training.max_steps or 0, config.model.context_length
    loader = TrainingLoader(corpus.split("train"), config.data, seed, time, training.global_batch_size)
    model, averaged = (GPT(config.model, 257, knobs).initialize(seed).double() for _ in range(2))
    weights = dict(model.named_parameters())
    decays = {name: weight.ndim == 2 and not name.startswith("auxiliary.") for name, weight in weights.items()}
    decays["embedding.weight"] = decays["embedding.weight"] and knobs.decay_embeddings
    mean, square = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    average: Weights = {}
    # Whole windows behind a random offset of less than one.
    steps_per_epoch = ((corpus.split("train").n_tokens - 1) // time - 1) / training.global_batch_size
    records = []
    for step in range(total):
        kinds = readings(config, step)
        n_targets = sum(time + 1 - offset for _, offset in kinds)
        n_ordinary = time * kinds.count((False, 1))
        record = {"step": step + 1, "tokens": (step + 1) * training.global_batch_size * time}
        record |= {"train/lr": config.optimizer.lr * share_of_peak(config, step)}
        objective = loss = second = again = torch.zeros(())
        model.train(dropout_acts(config, step))  # dropouts are all that it has two modes of
        for micro_batch in range(training.micro_batches):
            batch = loader.batch(step, micro_batch * size, size)
            mine = kinds[micro_batch * size : (micro_batch + 1) * size]
            parts = sums_of(model, batch, mine, config, (seed, step, micro_batch))
            objective, loss = objective + parts[0] / n_targets, loss + parts[1] / max(1, n_ordinary)
            second = second + parts[2] / (n_targets - training.global_batch_size)
            again = again + parts[3] / n_targets
        objective = objective + knobs.multi_token_weight * second + knobs.masked_input_weight * again
        record |= {"train/masked_input_loss": again.item()} if knobs.masked_input_weight else {}
        record |= {"train/multi_token_loss": second.item()} if knobs.multi_token_weight else {}
        record |= {"train/objective": objective.item()} | ({"train/loss": loss.item()} if n_ordinary else {})
        for name, weight in weights.items():
            if decays[name]:
                objective = objective + knobs.l1 * weight.abs().sum() + knobs.l2 * weight.square().sum()
        gradients = torch.autograd.grad(objective, list(weights.values()))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        record["train/grad_norm"] = norm
        limit = config.optimizer.grad_clip or math.inf

        # Loshchilov & Hutter 2019, algorithm 2, in the form of torch: the decay is multiplied by the learning rate.
        (beta1, beta2), lr = config.optimizer.betas, record["train/lr"]
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                gradient = gradient * min(1.0, limit / norm)
                mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
                square[name] = beta2 * square[name] + (1 - beta2) * gradient**2
                m, v = mean[name] / (1 - beta1 ** (step + 1)), square[name] / (1 - beta2 ** (step + 1))
                decay = decay_at(config, step, steps_per_epoch) if decays[name] else 0.0
                update = m / (v.sqrt() + config.optimizer.eps)
                shrunk = (update * weight > 0) if knobs.cautious_weight_decay else torch.ones_like(weight)
                weight.copy_(weight - lr * (update + decay * shrunk * weight))

        now, done = {name: weight.detach().clone() for name, weight in weights.items()}, step + 1
        if knobs.ema_decay:
            before, kept = average or now, min(knobs.ema_decay, (1 + done) / (10 + done))
            average = {name: kept * before[name] + (1 - kept) * now[name] for name in now}
        elif knobs.swa_start is not None and done >= knobs.swa_start * total:
            place, rest = divmod(done - round(knobs.swa_start * total), knobs.swa_every)
            if rest == 0:
                average = {name: (place * average.get(name, 0.0) + now[name]) / (place + 1) for name in now}
        if done % (config.evaluation.every or 1) == 0:  # type: ignore[operator]
            record["val/loss"] = loss_of(model, corpus.split("val"), config)
            record["gap/loss"] = record["val/loss"] - loss_of(model, corpus.split("train"), config)
            if average:
                averaged.load_state_dict(average)
                record["val_average/loss"] = loss_of(averaged, corpus.split("val"), config)
        records.append(record)
    return records, now, average


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_is_its_replay_in_float64(
    name: str, train: Train, tiny: Callable[..., list[str]], tmp_path: Path, whole_run: Path
) -> None:
    teachers = [whole_run, whole_run / "checkpoints/step_00000020"] if name == "distilled" else []
    flags = tiny(**RUNS[name], run__teachers=f"[{','.join(map(str, teachers))}]")
    assert train(flags).returncode == 0
    config = parse(flags)
    corpus = Corpus.open(next((tmp_path / "corpora").glob("[!.]*")))
    expected, weights, average = replay(config, corpus)

    found = read_metrics(tmp_path / "runs/tiny")
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            tolerance = {"abs": 1e-5} if key == "gap/loss" else {"rel": 3e-6}  # a difference of two losses
            assert ours[key] == pytest.approx(value, **tolerance), (ours["step"], key)
        for name in ("val_average/loss", "train/loss", "train/multi_token_loss", "train/masked_input_loss"):
            assert (name in ours) == (name in theirs)
    last, far = existing(tmp_path / "runs/tiny/checkpoints")[0], 0
    for file, tensors in (("model", weights), ("average", average)):
        stored = read_tensors(last, file)
        assert stored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            far += int(((stored[key].double() - tensor).abs() > 3e-6 + 1e-5 * tensor.abs()).sum())
    assert far <= (30 if config.regularizers.l1 else 0)
    # What the flags above are for: clipping of little and of much, a gap, two different weights to be judged.
    norms, limit = [record["train/grad_norm"] for record in expected], config.optimizer.grad_clip
    if limit:
        assert any(norm < limit for norm in norms) and any(limit < norm < 2 * limit for norm in norms)
    assert max(abs(record["gap/loss"]) for record in expected if "gap/loss" in record) > 1e-3
    assert expected[-1]["val_average/loss"] != pytest.approx(expected[-1]["val/loss"], rel=1e-4)
