"""What is done to the inputs, in its order, by hand and by statistics."""

from __future__ import annotations

import math

import pytest
import torch

from config import Model, Regularizers
from model.gpt import GPT
from regularizers import inputs
from regularizers.inputs import InputChanges, Readings, draw_changes, draw_readings, mask_inputs, replace_tokens
from regularizers.objective import objective

CPU = torch.device("cpu")
NONE = torch.nn.ParameterDict()  # of the vectors that a model's regularizers train


def test_noise_then_token_dropout_then_mixup_by_hand() -> None:
    """Two sequences of one position, one wide: 1 and 2; noise +1 and +2; the second is dropped, the first doubled.

    (1+1)·2 = 4 and (2+2)·0 = 0. The first keeps 3/4 of itself: 3. The second keeps half: 0.5·0 + 0.5·4 = 2.
    """
    changes = InputChanges(
        noise_BTD=torch.tensor([[[1.0]], [[2.0]]]),
        keep_BT=torch.tensor([[2.0], [0.0]]),
        partner_B=torch.tensor([1, 0]),
        share_B=torch.tensor([0.75, 0.5]),
    )
    assert changes.apply(torch.tensor([[[1.0]], [[2.0]]]), NONE).flatten().tolist() == [3.0, 2.0]


def test_reversed_sequences_by_hand() -> None:
    """Windows 1 2 3 4 and 5 6 7 8, the second read backwards: 8 7 6 predict 7 6 5."""
    readings = Readings(torch.tensor([False, True]), torch.ones(2, dtype=torch.long))
    tokens, targets = torch.tensor([[1, 2, 3], [5, 6, 7]]), torch.tensor([[2, 3, 4], [6, 7, 8]])
    read = readings.apply(tokens, targets, None, None)
    assert read[0].tolist() == [[1, 2, 3], [8, 7, 6]] and read[1].tolist() == [[2, 3, 4], [7, 6, 5]]
    assert readings.targets_B(3, isolated=False).tolist() == [3, 3] and readings.ordinary_B.tolist() == [True, False]
    # Its embeddings, and no others, get the direction.
    changed = InputChanges(readings).apply(
        torch.ones(2, 3, 1), torch.nn.ParameterDict({"direction": torch.tensor([5.0])})
    )
    assert changed.flatten().tolist() == [1, 1, 1, 6, 6, 6]


def test_a_reversed_sequence_of_isolated_documents_by_hand() -> None:
    """5 6 | 7 8, and then 9, of which nobody knows the document: read are 8 7 | 6 5, and 5 has no target."""
    documents, positions = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    tokens, targets = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[6, 7, 8, 9]])
    turned = Readings(torch.tensor([True]), torch.tensor([1]))
    read = [part.tolist() for part in turned.apply(tokens, targets, positions, documents) if part is not None]
    assert read == [[[8, 7, 6, 5]], [[7, 6, 5, -1]], [[0, 1, 0, 1]], [[1, 1, 0, 0]]]
    assert turned.targets_B(4, isolated=True).tolist() == [3]
    uneven = turned.apply(tokens, targets, torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 0, 0, 1]]))[2]
    assert uneven is not None and uneven.tolist() == [[0, 0, 1, 2]]


def test_offsets_by_hand() -> None:
    """Of the window 1 2 3 4 5 the targets one, two and three ahead; backwards two ahead: 5 4 3 2 predict 3 2 1."""
    readings = Readings(torch.tensor([False, False, False, True]), torch.tensor([1, 2, 3, 2]))
    tokens, targets = torch.tensor([[1, 2, 3, 4]] * 4), torch.tensor([[2, 3, 4, 5]] * 4)
    read = readings.apply(tokens, targets, None, None)
    assert read[0].tolist() == [[1, 2, 3, 4]] * 3 + [[5, 4, 3, 2]]
    assert read[1].tolist() == [[2, 3, 4, 5], [3, 4, 5, -1], [4, 5, -1, -1], [3, 2, 1, -1]]
    assert readings.targets_B(4, isolated=False).tolist() == [4, 3, 2, 3]
    assert readings.ordinary_B.tolist() == [True, False, False, False]
    isolated = readings.apply(tokens, targets, torch.arange(4).expand(4, 4), torch.zeros(4, 4).long())
    assert isolated[1].tolist()[3] == [2, 1, -1, -1] and readings.targets_B(4, isolated=True).tolist() == [4, 3, 2, 2]
    vectors = torch.nn.ParameterDict({"direction": torch.tensor([5.0]), "offset": torch.tensor([[10.0], [20.0]])})
    assert InputChanges(readings).apply(torch.zeros(4, 1, 1), vectors).flatten().tolist() == [0, 10, 20, 15]


def test_offsets_are_drawn_in_proportion_to_exp() -> None:
    """p(i) = e^-i / (e^-1 + e^-2 + e^-3): 0.6652, 0.2447, 0.0900."""
    drawn = [draw_readings(Regularizers(target_offset=3), 8, 0, step) for step in range(2000)]
    offsets = torch.cat([one.offset_B for one in drawn if one is not None])
    for offset, share in ((1, 0.66524), (2, 0.24473), (3, 0.09003)):
        error = math.sqrt(share * (1 - share) / len(offsets))
        assert (offsets == offset).double().mean().item() == pytest.approx(share, abs=4 * error)
    assert not any(one.reversed_B.any() for one in drawn if one is not None)


def test_masked_inputs_by_hand() -> None:
    """The mask takes the place of an embedding before anything is added: 7 + 5 (reversed) + 1 (noise); 2 + 5 + 1."""
    changes = InputChanges(
        readings=Readings(torch.tensor([True]), torch.tensor([1])),
        noise_BTD=torch.ones(1, 2, 1),
        masked_BT=torch.tensor([[True, False]]),
    )
    vectors = torch.nn.ParameterDict({"direction": torch.tensor([5.0]), "mask": torch.tensor([7.0])})
    assert changes.apply(torch.tensor([[[1.0], [2.0]]]), vectors).flatten().tolist() == [13, 8]


def test_the_rate_of_masked_inputs_is_uniform_over_sequences() -> None:
    """Shares of 20,000 positions in 512 sequences: mean and variance of U(0, 0.6), and nothing beyond its end."""
    knobs = Regularizers(masked_input_weight=1, masked_input_rate=0.6)
    changes = mask_inputs(None, (512, 20_000), knobs, 0, 0, 0, CPU)
    assert changes is not None and changes.masked_BT is not None
    shares = changes.masked_BT.double().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=4 * 0.6 / math.sqrt(12 * 512))
    assert shares.var().item() == pytest.approx(0.6**2 / 12, rel=0.2)
    assert shares.min() < 0.02 and 0.58 < shares.max() < 0.62
    first = draw_changes((4, 8, 2), Regularizers(token_dropout=0.5, mixup_alpha=1), 0, 0, 0, CPU)
    again = mask_inputs(first, (4, 8), knobs, 0, 0, 0, CPU)
    assert first is not None and again is not None  # in all else the second pass is as the first
    assert again.keep_BT is first.keep_BT and again.partner_B is first.partner_B and again.share_B is first.share_B
    assert mask_inputs(first, (4, 8), Regularizers(), 0, 0, 0, CPU) is None


def test_mixup_mixes_only_what_is_read_alike() -> None:
    knobs = Regularizers(mixup_alpha=1.0, reversed_fraction=0.5, target_offset=2)
    for step in range(20):
        readings = draw_readings(knobs, 8, 0, step)
        assert readings is not None
        changes = draw_changes((8, 4, 2), knobs, 0, step, 0, CPU, readings)
        alone = draw_changes((8, 4, 2), knobs, 0, step, 0, CPU)
        assert changes is not None and changes.partner_B is not None and alone is not None
        kinds = list(zip(readings.reversed_B.tolist(), readings.offset_B.tolist(), strict=True))
        same = torch.tensor([kinds[row] == kinds[partner] for row, partner in enumerate(alone.partner_B)])
        assert torch.equal(changes.partner_B, torch.where(same, alone.partner_B, torch.arange(8)))  # type: ignore[arg-type]


def test_the_share_of_reversed_sequences() -> None:
    drawn = [draw_readings(Regularizers(reversed_fraction=0.3), 8, 0, step) for step in range(1000)]
    share = torch.stack([one.reversed_B for one in drawn if one is not None]).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 8000))


def test_the_model_applies_them_before_positions() -> None:
    """With every embedding dropped, what is left are the positions: all sequences look the same."""
    model = GPT(Model(family="gpt2", n_layers=1, d_model=8, n_heads=2, context_length=4), 11).initialize(0)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    nothing = model(tokens, changes=InputChanges(keep_BT=torch.zeros(2, 4)))
    torch.testing.assert_close(nothing[0], nothing[1])
    assert not torch.allclose(nothing[0, 0], nothing[0, 1])


def test_replacement_rate_and_range() -> None:
    tokens = torch.full((64, 512), 5)
    replaced = replace_tokens(tokens, 0.2, 50, 0, 0, 0)
    expected = 0.2 * 49 / 50  # one in fifty draws the id that was there
    error = math.sqrt(expected * (1 - expected) / tokens.numel())
    assert (replaced != 5).double().mean().item() == pytest.approx(expected, abs=4 * error)
    counts = torch.bincount(replaced[replaced != 5], minlength=50).double()
    mean = counts.sum() / 49
    chi_squared = ((counts - mean) ** 2 / mean)[torch.arange(50) != 5].sum().item()
    assert chi_squared < 94  # 48 degrees of freedom, p = 1e-4
    assert replace_tokens(tokens, 0.0, 50, 0, 0, 0) is tokens


def test_each_place_of_the_run_draws_its_own() -> None:
    knobs = Regularizers(token_dropout=0.5, mixup_alpha=1.0, embedding_noise=5.0)
    places = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    drawn = [draw_changes((4, 64, 2), knobs, *place, CPU) for place in places]
    again = draw_changes((4, 64, 2), knobs, *places[0], CPU)
    assert drawn[0] is not None and again is not None
    for field in ("noise_BTD", "keep_BT", "partner_B", "share_B"):
        assert torch.equal(getattr(drawn[0], field), getattr(again, field))
        if field != "partner_B":  # only 24 permutations of four
            assert all(not torch.equal(getattr(drawn[0], field), getattr(other, field)) for other in drawn[1:])
    # One knob's draws do not move when another is switched on.
    alone = draw_changes((4, 64, 2), Regularizers(token_dropout=0.5), *places[0], CPU)
    assert alone is not None and torch.equal(alone.keep_BT, drawn[0].keep_BT)


def test_noise_has_neftunes_size() -> None:
    changes = draw_changes((8, 100, 16), Regularizers(embedding_noise=5.0), 0, 0, 0, CPU)
    assert changes is not None and changes.noise_BTD is not None
    limit = 5 / math.sqrt(100 * 16)
    assert changes.noise_BTD.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert changes.noise_BTD.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)


def test_mixup_shares_follow_their_beta() -> None:
    shares = torch.cat(
        [
            draw_changes((64, 2, 2), Regularizers(mixup_alpha=0.4), 0, step, 0, CPU).share_B  # type: ignore[union-attr]
            for step in range(100)
        ]
    ).double()
    variance = 0.25 / (2 * 0.4 + 1)  # of Beta(α, α)
    assert shares.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(shares)))
    assert shares.var().item() == pytest.approx(variance, rel=0.05)


def test_mixed_objective_is_the_mixture_of_both() -> None:
    """λ·CE(y) + (1−λ)·CE(y'), smoothed or not; z-loss and entropy count once."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([8, 1, 0, 7, 2, 2])
    share = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.9, 0.2], dtype=torch.float64)
    knobs = Regularizers(label_smoothing=0.1, z_loss=0.01, entropy_penalty=0.2)
    found = objective(hidden, weight, first, knobs, 6.0, mixed=(second, share))

    def alone(row: int, target: torch.Tensor) -> dict[str, torch.Tensor]:
        return objective(hidden[row : row + 1], weight, target[row : row + 1], knobs, 6.0)

    for name in ("objective", "loss", "z_loss", "entropy"):
        parts = [share[r] * alone(r, first)[name] + (1 - share[r]) * alone(r, second)[name] for r in range(6)]
        assert found[name].item() == pytest.approx(sum(parts).item(), rel=1e-12)  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(
        lambda h, w: objective(h, w, first, knobs, 6.0, mixed=(second, share))["objective"], (hidden, weight)
    )


def test_what_is_drawn_on_the_cpu_is_moved_in_the_way_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it goes through ``hardware.moved``; noise is drawn where it is used."""
    config = Regularizers(token_dropout=0.1, mixup_alpha=0.2, masked_input_weight=0.4, reversed_fraction=0.5)
    elsewhere, moved = torch.device("meta"), list[torch.Tensor]()

    def note(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(value)
        return torch.empty_like(value, device=device)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("moved in another way")

    monkeypatch.setattr(inputs, "moved", note)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    readings = draw_readings(config, 4, 0, 0)
    assert readings is not None
    here = readings.of(0, 2, elsewhere)
    changes = draw_changes((2, 8, 4), config, 0, 0, 0, elsewhere, here)
    changes = mask_inputs(changes, (2, 8), config, 0, 0, 0, elsewhere)
    replaced = replace_tokens(torch.zeros(2, 8, dtype=torch.long, device=elsewhere), 0.1, 9, 0, 0, 0)
    assert changes is not None and changes.masked_BT is not None and changes.share_B is not None
    assert {one.device.type for one in (here.reversed_B, changes.masked_BT, changes.share_B, replaced)} == {"meta"}
    assert len(moved) == 8 and {one.device.type for one in moved} == {"cpu"}
