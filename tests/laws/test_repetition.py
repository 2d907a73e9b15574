"""Law 4 on two threads, which may meet at the first call of something: new processes compute the same, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

# Prints a sha256 of the objective and its gradients for each of so many new processes, three at once. They are forked
# from one that has imported everything and computed nothing, so that each makes all its first calls itself and costs a
# hundredth of one that imports torch.
# In process 0 MKL's vector functions, if `resolve` has not settled them, are told the kind of processor that a thread
# reads which comes between the two steps of settling on an AVX-512 processor (see settle_vector_math).
PROGRAM = """
import hashlib, os, sys, traceback
import torch
from config import Regularizers, Run
from regularizers.objective import objective
from hardware import resolve

processes, at_once = int(sys.argv[1]), 3
drawn = torch.Generator().manual_seed(0)
hidden_ND, weight_VD = (torch.randn(rows, 32, generator=drawn) for rows in (256, 257))
targets_N = torch.randint(257, (256,), generator=drawn)
knobs = Regularizers(label_smoothing=0.1, z_loss=1e-3, entropy_penalty=0.1)

def digest(number):
    resolve(Run(device="cpu", precision="fp32", threads=2))
    if number == 0:
        os.environ["MKL_VML_DEBUG_CPU_TYPE"] = "9"
    inputs = hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    terms = objective(*inputs, targets_N, knobs, 256)
    terms["objective"].backward()
    numbers = [*terms.values(), *(tensor.grad for tensor in inputs)]
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in numbers)).hexdigest()

for number in range(processes + at_once):
    if number >= at_once and number - at_once < processes:
        assert os.wait()[1] == 0
    if number < processes and os.fork() == 0:
        try:
            os.write(1, f"{number} {digest(number)}\\n".encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
"""


@pytest.mark.parametrize("processes", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_new_processes_compute_the_same_on_two_threads(processes: int) -> None:
    """Without settle_vector_math process 0 differs, each time, where torch has MKL 2024 and the processor AVX2.

    The others differ on Intel's processors alone: one in a hundred on a busy machine, more on an idle one.
    """
    command = [sys.executable, "-c", PROGRAM, str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    digests = dict(line.split() for line in ended.stdout.splitlines())
    assert len(digests) == processes
    assert len(set(digests.values())) == 1, Counter(digests.values())
