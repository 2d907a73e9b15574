"""The objective at a large vocabulary: time and memory of ours, of the plain form, and of plain cross-entropy alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import ROOT, ratio, spread, told
from config import Regularizers
from hardware import missing_for_compile
from regularizers.objective import objective

VOCABULARY, WIDTH, TOKENS = 50257, 256, 4096
TERMS = Regularizers(label_smoothing=0.1, z_loss=1e-4, entropy_penalty=0.1)


def ours(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return objective(hidden_ND, weight_VD, targets_N, TERMS, TOKENS)["objective"]


def compiled(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return objective(hidden_ND, weight_VD, targets_N, TERMS, TOKENS, compiled=True)["objective"]


def plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The same terms as one would write them, all logits at once."""
    z_NV = hidden_ND @ weight_VD.T
    smoothing = TERMS.label_smoothing * VOCABULARY / (VOCABULARY - 1)  # torch counts the target among the others
    loss = F.cross_entropy(z_NV, targets_N, label_smoothing=smoothing)
    log_p_NV = z_NV.log_softmax(dim=1)
    entropy = -(log_p_NV.exp() * log_p_NV).sum(1).mean()
    return loss + TERMS.z_loss * z_NV.logsumexp(1).square().mean() - TERMS.entropy_penalty * entropy


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(hidden_ND @ weight_VD.T, targets_N)


FORMS = {
    "ours, all terms": ours,
    "ours, all terms, compiled": compiled,
    "plain form, all terms": plain,
    "plain cross-entropy alone": cross_entropy,
}


def once(name: str) -> dict[str, float]:
    """Forward and backward, fp32, done again: value, seconds, and the bytes by which the process grew."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight_VD = (0.05 * torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
    targets_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    torch.autograd.backward(FORMS[name](hidden_ND, weight_VD, targets_N))  # compiles, and the gradients are there
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    before, started = memory("VmRSS"), time.perf_counter()
    value = FORMS[name](hidden_ND, weight_VD, targets_N)
    torch.autograd.backward(value)
    return {"value": value.item(), "seconds": time.perf_counter() - started, "bytes": memory("VmHWM") - before}


def memory(what: str) -> float:
    """VmRSS, what the process holds now, or VmHWM, the most it held, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(what)).split()[1])


def measure(rounds: int = 3) -> dict[str, Any]:
    """Of each form: values, seconds and bytes [rounds], each time in a process of its own."""
    names = [name for name in FORMS if "compiled" not in name or not missing_for_compile()]
    results: dict[str, Any] = {name: {"value": [], "seconds": [], "bytes": []} for name in names}
    for _ in range(rounds):
        for name, held in results.items():
            said = subprocess.check_output([sys.executable, "-m", "benchmarks.losses", name], cwd=ROOT)
            for what, value in json.loads(said).items():
                held[what].append(value)
    return results


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, ratios first."""
    form, alone = results["plain form, all terms"], results["plain cross-entropy alone"]
    lines = [f"V = {VOCABULARY:,}, {WIDTH} wide, {TOKENS:,} tokens, fp32, forward and backward"]
    for name in (name for name in results if name.startswith("ours")):
        mine = results[name]
        lines += [
            f"  {ratio(mine['bytes'], form['bytes'])[0]:5.3f}  extra memory of {name} / of the plain form",
            f"  {ratio(mine['seconds'], form['seconds'])[0]:5.2f}   time of {name} / of the plain form",
            f"  {ratio(mine['seconds'], alone['seconds'])[0]:5.2f}   time of {name} / of plain cross-entropy alone",
        ]
    for name, held in results.items():
        extra = f"+{spread(held['bytes'])[0] / 1e6:7,.0f} MB  {name:<28} {held['value'][0]:.5f}"
        lines.append(f"  {told(spread(held['seconds']), ' s')}  {extra}")
    return lines


if __name__ == "__main__":
    print(json.dumps(once(sys.argv[1])))
