"""A training step: ours without and with dropout and with every regularizer, a plain GPT-2's, Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.opponents import PlainGPT2, Shape, hugging_face, stepper
from benchmarks.ours import DROPOUT, everything_on, our_step
from benchmarks.timing import in_turn, ratio, spread
from hardware import has_fast_bf16, missing_for_compile, operations_per_token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE, SMALL = Shape(6, 384, 6, 256, 8, 65), Shape(4, 128, 4, 64, 12, 65)
SHAPES = {"6x384": (LARGE, 1), "4x128": (SMALL, 10)}  # with the number of steps that are timed together
PRODUCT = 2048
if DEVICE.type == "cuda":
    SHAPES = {"GPT-2 124M": (Shape(12, 768, 12, 1024, 12, 50257), 1), "6x384": (LARGE, 10)}
    PRODUCT = 8192
Step = Callable[[Tensor, Tensor], Any]


def steps_of(shape: Shape) -> dict[str, Step]:
    """All that is timed on a shape, by name."""
    fast = "bf16" if has_fast_bf16(DEVICE.type) else "fp32"
    knobs = {
        "nothing on": {"weight_decay": 0.1},
        "dropout 0.2": DROPOUT,
        "everything on": everything_on(),
        "everything but stochastic depth": everything_on(stochastic_depth=0.0),
    }
    steps: dict[str, Step] = {}
    for compile in ("off",) if DEVICE.type == "cpu" and missing_for_compile() else ("off", "on"):
        for what, values in knobs.items():
            name = f"ours {fast}, {what}" + (", compiled" if compile == "on" else "")
            steps[name] = our_step(shape, fast, values, compile)
    for precision in ("fp32", "bf16"):
        for dropout in (0.0, 0.2):
            plain = PlainGPT2(shape, dropout).to(DEVICE)
            steps[f"plain GPT-2 {precision}, dropout {dropout:g}"] = stepper(plain, plain, precision == "bf16")
    try:
        import transformers  # noqa: F401
    except ImportError:
        return steps
    for precision in ("fp32", "bf16"):
        theirs = hugging_face(shape, 0.2).to(DEVICE)
        steps[f"Hugging Face {precision}, dropout 0.2"] = stepper(
            hugging_face_loss(theirs), theirs, precision == "bf16"
        )
    return steps


def hugging_face_loss(model: Any) -> Step:
    """The loss on targets that are shifted already, as their Trainer's shift would have it."""
    return lambda tokens_BT, targets_BT: model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss


def flops(shape: Shape) -> float:
    """Floating-point operations of a step's products, without those of biases, gains and positions."""
    parameters = 12 * shape.n_layers * shape.d_model**2 + shape.vocab_size * shape.d_model
    return shape.tokens * operations_per_token(parameters, shape.n_layers, shape.d_model, shape.context)


def product(dtype: torch.dtype) -> Callable[[], object]:
    """A product of two square matrices of PRODUCT rows, to know what the machine can do."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device=DEVICE).to(dtype) for _ in range(2))
    return partial(repeat, torch.matmul, left, right, 1)


def repeat(work: Step, first: Tensor, second: Tensor, times: int) -> None:
    """So many calls, to the end of the last: short ones are timed together."""
    for _ in range(times):
        work(first, second)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def gpu_memory(work: Callable[[], object]) -> int:
    """Bytes that a GPU holds at most during ``work``, beyond those it held before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def measure(rounds: int = 8) -> dict[str, Any]:
    """Seconds of each step [rounds], for both shapes; of matrix products too."""
    results: dict[str, Any] = {}
    for name, (shape, times) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(shape.vocab_size, (shape.batch, shape.context), generator=generator).to(DEVICE)
        works = {what: partial(repeat, step, tokens_BT, tokens_BT, times) for what, step in steps_of(shape).items()}
        products = {"product fp32": product(torch.float32), "product bf16": product(torch.bfloat16)}
        torch.compiler.reset()  # what was compiled for the other shape would have this one's sizes made variables
        first = in_turn({what: works[what] for what in works if "compiled" in what}, rounds=1, warmup=0)
        seconds = in_turn(works | products, rounds)
        results[name] = {
            "seconds": {
                what: [one / (times if what in works else 1) for one in all_] for what, all_ in seconds.items()
            },
            "first": {what: seconds for what, (seconds,) in first.items()},
            "memory": {what: gpu_memory(work) for what, work in works.items()} if DEVICE.type == "cuda" else {},
            "tokens": shape.tokens,
            "flops": flops(shape),
        }
    return results


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, ratios first."""
    lines = []
    for name, result in results.items():
        seconds = result["seconds"]
        ours = [what for what in seconds if what.startswith("ours")]
        fastest = min((what for what in ours if "nothing on" in what), key=lambda what: spread(seconds[what])[0])
        dropped = [what for what in ours if "dropout 0.2" in what]
        others = [what for what in seconds if "dropout 0.2" in what and what not in ours]
        lines.append(f"{name}: how many times faster ours is with dropout 0.2, then what regularization costs us")
        pairs = [(other, mine) for mine in dropped for other in others]
        pairs += [(what, fastest) for what in ours if "nothing on" not in what]
        pairs.append(("plain GPT-2 fp32, dropout 0.2", "plain GPT-2 fp32, dropout 0"))
        for above, below in pairs:
            middle, low, high = ratio(seconds[above], seconds[below])
            lines.append(f"  {middle:5.2f} ({low:.2f} to {high:.2f})  {above} / {below}")
        rates = {kind: 2 * PRODUCT**3 / spread(seconds[f"product {kind}"])[0] for kind in ("fp32", "bf16")}
        for what, times in seconds.items():
            if what.startswith("product"):
                continue
            middle, low, high = spread(times)
            done = result["flops"] / middle
            share = done / rates["bf16" if "bf16" in what else "fp32"]
            lines.append(
                f"  {1000 * middle:7.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})  {what:<51} "
                f"{result['tokens'] / middle:7,.0f} tokens/s, {share:4.0%} of a matrix product's rate"
                + (f", {result['memory'][what] / 1e6:,.0f} MB" if result["memory"] else "")
            )
        if not any(what.startswith("Hugging Face") for what in seconds):
            lines.append(
                "  Hugging Face's GPT-2 is left out: it needs transformers (pip install --editable '.[bench]')"
            )
        if result["first"]:
            low, high = min(result["first"].values()), max(result["first"].values())
            lines.append(f"  {low:.0f} to {high:.0f} s for the first compiled steps")
        lines += [
            f"  {rate / 1e9:7.0f} GFLOP/s  a {PRODUCT} x {PRODUCT} product in {kind}" for kind, rate in rates.items()
        ]
    return lines
