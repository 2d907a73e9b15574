"""A training step: ours without, with some and with every regularizer, a plain GPT-2's, Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.opponents import PlainGPT2, Shape, hugging_face, plain_adamw, stepper
from benchmarks.ours import DROPOUT, everything_on, our_step
from benchmarks.timing import in_turn, ratio, seconds_of, spread, told
from hardware import has_fast_bf16, missing_for_compile, operations_per_token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE, SMALL = Shape(6, 384, 6, 256, 8, 65), Shape(4, 128, 4, 64, 12, 65)
SHAPES = {"6x384": (LARGE, 1), "4x128": (SMALL, 10)}  # with the number of steps that are timed together
PRODUCT = 2048
# Timed alone, at their typical values: what changes the sequences, predicts more, or goes through the network again.
ALONE = ("reversed_fraction", "target_offset", "multi_token_weight", "masked_input_weight")
if DEVICE.type == "cuda":
    SHAPES = {"GPT-2 124M": (Shape(12, 768, 12, 1024, 12, 50257), 1), "6x384": (LARGE, 10)}
    PRODUCT = 8192
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[Tensor, Tensor], Any]


def steps_of(shape: Shape) -> dict[str, Step]:
    """All that is timed on a shape, by name."""
    fast = "bf16" if has_fast_bf16(DEVICE.type) else "fp32"
    knobs = {
        "nothing on": {"weight_decay": 0.1},
        "dropout 0.2": DROPOUT,
        "everything on": everything_on(),
        "everything but stochastic depth": everything_on(stochastic_depth=0.0),
        "one teacher of its size": {"distillation_weight": 0.5},
    }
    alone = {name: {name: everything_on()[name]} for name in ALONE}
    steps: dict[str, Step] = {}
    for compile in ("off",) if DEVICE.type == "cpu" and missing_for_compile() else ("off", "on"):
        # The compiler keeps eight forms of a network; these would be too many.
        for what, values in (knobs if compile == "on" else knobs | alone).items():
            name = f"ours {fast}, {what}" + (", compiled" if compile == "on" else "")
            steps[name] = our_step(shape, fast, values, compile)
    has_transformers = find_spec("transformers") is not None
    for precision in ("fp32", "bf16"):
        for dropout in (0.0, 0.2):
            plain = PlainGPT2(shape, dropout).to(DEVICE)
            name = f"plain GPT-2 {precision}, dropout {dropout:g}"
            steps[name] = stepper(plain, plain_adamw(plain), precision == "bf16")
        if has_transformers:
            loss_of, theirs = hugging_face(shape, 0.2, DEVICE)
            name = f"Hugging Face {precision}, dropout 0.2"
            steps[name] = stepper(loss_of, plain_adamw(theirs), precision == "bf16")
    return steps


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
    for title, (shape, times) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(shape.vocab_size, (shape.batch, shape.context), generator=generator).to(DEVICE)
        works = {name: partial(repeat, step, tokens_BT, tokens_BT, times) for name, step in steps_of(shape).items()}
        products = {f"product {kind}": product(dtype) for kind, dtype in KINDS.items()}
        torch.compiler.reset()  # otherwise this shape, the second it sees, would be compiled with dynamic sizes
        first = {name: seconds_of(works[name]) for name in works if "compiled" in name}
        seconds = in_turn(works | products, rounds)
        parameters = 12 * shape.n_layers * shape.d_model**2 + shape.vocab_size * shape.d_model  # of matrices
        results[title] = {
            "seconds": {name: [one / times for one in seconds[name]] for name in works},
            "products": {kind: seconds[f"product {kind}"] for kind in KINDS},
            "first": first,
            "memory": {name: gpu_memory(work) for name, work in works.items()} if DEVICE.type == "cuda" else {},
            "tokens": shape.tokens,
            "flops": shape.tokens * operations_per_token(parameters, shape.n_layers, shape.d_model, shape.context),
        }
    return results


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, ratios first."""
    lines = []
    for title, result in results.items():
        seconds = result["seconds"]
        lines.append(f"{title}: how many times faster ours is with dropout 0.2, then what regularization costs us")
        lines += [
            f"  {told(ratio(seconds[above], seconds[below]))}  {above} / {below}" for above, below in pairs(seconds)
        ]
        rates = {kind: 2 * PRODUCT**3 / spread(times)[0] for kind, times in result["products"].items()}
        for name, times in seconds.items():
            middle = spread(times)[0]
            share = result["flops"] / middle / rates["bf16" if "bf16" in name else "fp32"]
            memory = f", {result['memory'][name] / 1e6:,.0f} MB" if result["memory"] else ""
            lines.append(
                f"  {told(spread([1000 * one for one in times]), ' ms', 1)}  {name:<51} "
                f"{result['tokens'] / middle:7,.0f} tokens/s, {share:4.0%} of a matrix product's rate{memory}"
            )
        if not any(what.startswith("Hugging Face") for what in seconds):
            lines.append(
                "  Hugging Face's GPT-2 is left out: it needs transformers (pip install --editable '.[bench]')"
            )
        if result["first"]:
            low, high = min(result["first"].values()), max(result["first"].values())
            lines.append(f"  {low:.0f} to {high:.0f} s for the first compiled steps")
        for kind, rate in rates.items():
            lines.append(f"  {rate / 1e9:7.0f} GFLOP/s  a {PRODUCT} x {PRODUCT} product in {kind}")
    return lines


def pairs(seconds: dict[str, list[float]]) -> list[tuple[str, str]]:
    """The steps whose ratio is told: others to ours with dropout, what ours adds to our fastest, what dropout costs."""
    ours = [name for name in seconds if name.startswith("ours")]
    others = [name for name in seconds if "dropout 0.2" in name and name not in ours]
    fastest = min((name for name in ours if "nothing on" in name), key=lambda name: spread(seconds[name])[0])
    found = [(other, mine) for mine in ours if "dropout 0.2" in mine for other in others]
    found += [(mine, fastest) for mine in ours if "nothing on" not in mine]
    return [*found, ("plain GPT-2 fp32, dropout 0.2", "plain GPT-2 fp32, dropout 0")]
