"""Seeds are unrelated across purposes and places, and nothing else in the house seeds anything."""

from __future__ import annotations

import re

from conftest import ROOT

from randomness import numpy_generator, seed_for, torch_generator


def test_seeds_are_distinct_and_in_range() -> None:
    seeds = {
        seed_for(seed, purpose, i, j) for seed in range(5) for purpose in "abc" for i in range(20) for j in range(20)
    }
    assert len(seeds) == 5 * 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_indices_do_not_run_together() -> None:
    assert seed_for(1, "a", 12, 3) != seed_for(1, "a", 1, 23)
    assert seed_for(1, "a") != seed_for(1, "a", 0)
    assert seed_for(0, "epoch", 2) != seed_for(1, "epoch", 1)  # the trap of seed + epoch


def test_seeds_stay_what_they_are() -> None:
    """A literal: a change of the function would silently change every run."""
    import hashlib

    digest = hashlib.blake2b(b"7\x1fdata order\x1f3", digest_size=8).digest()
    assert seed_for(7, "data order", 3) == int.from_bytes(digest, "big") // 2


def test_generators_repeat() -> None:
    assert numpy_generator(0, "x", 1).integers(1 << 40) == numpy_generator(0, "x", 1).integers(1 << 40)
    import torch

    first, second = (torch.rand(4, generator=torch_generator(0, "x", 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_else_seeds_or_draws_without_a_generator() -> None:
    forbidden = re.compile(
        r"manual_seed\(|np\.random\.(seed|rand|default_rng)|random\.seed|import random\b|default_rng"
    )
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in (".venv", "tests", "benchmarks") or relative.name == "randomness.py":
            continue
        assert not forbidden.search(path.read_text()), f"{relative} seeds something; randomness.py is the only source"
