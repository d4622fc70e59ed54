"""RESTA, Safe LoRA and SafeMERGE against their papers' equations in float64, and the laws they must obey."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.solvers import resta, safe_lora, safe_merge, solution


@st.composite
def layers(draw):
    """(aligned, finetuned, safe, pretrained) in float64; alignment may be of low rank, or absent."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    rank = draw(st.integers(0, min(rows, columns)))
    aligned = random.normal(size=(rows, columns))
    alignment = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    others = (aligned + random.normal(size=(rows, columns)) for _ in range(2))
    return tuple(torch.tensor(each) for each in (aligned, *others, aligned - alignment))


def projected(aligned, finetuned, pretrained):
    """C Δ and cos⟨Δ, C Δ⟩ as the paper writes them, with C formed."""
    alignment = (aligned - pretrained).double().numpy()
    delta = (finetuned.double() - aligned.double()).numpy()
    norm = np.linalg.norm(alignment)
    if norm == 0:
        return np.zeros_like(delta), 0.0
    operator = alignment @ alignment.T / norm
    moved = operator @ delta
    return moved, (delta * moved).sum() / (np.linalg.norm(delta) * np.linalg.norm(moved))


def cosine_of(aligned, finetuned, pretrained):
    return safe_lora(aligned, finetuned, pretrained, threshold=0).detail["similarity"]


@given(layers(), st.floats(0, 1.1))
def test_safe_lora_is_the_papers_equation(layer, threshold):
    aligned, finetuned, _, pretrained = layer
    moved, cosine = projected(aligned, finetuned, pretrained)
    found = safe_lora(aligned, finetuned, pretrained, threshold=threshold)
    similarity = found.detail["similarity"]
    assert similarity == pytest.approx(cosine, abs=1e-9)
    assert 0 <= similarity <= 1
    assert math.isnan(found.safety_cost)
    if similarity >= threshold:
        assert torch.equal(found.weight, finetuned)
        assert (found.kept_energy, found.utility_loss) == (1, 0)
    else:
        np.testing.assert_allclose(found.weight, aligned.numpy() + moved, rtol=1e-9, atol=1e-10)
        delta = (finetuned - aligned).numpy()
        assert found.utility_loss == pytest.approx(((moved - delta) ** 2).sum() / (delta**2).sum())
        assert found.kept_energy == pytest.approx((moved * delta).sum() / (delta**2).sum())
        assert found.kept_entries == 0


@given(layers(), st.floats(0, 1.1), st.floats(0, 1))
def test_safe_merge_is_the_papers_equation(layer, threshold, alpha):
    aligned, finetuned, safe, pretrained = layer
    found = safe_merge(aligned, finetuned, safe, pretrained, threshold=threshold, alpha=alpha)
    if cosine_of(aligned, finetuned, pretrained) >= threshold:
        assert torch.equal(found.weight, finetuned)
        assert (found.kept_energy, found.utility_loss) == (1, 0)
        return
    delta = alpha * (finetuned - aligned) + (1 - alpha) * (safe - aligned)
    torch.testing.assert_close(found.weight, aligned + delta, rtol=1e-9, atol=1e-10)
    lost = float((delta - (finetuned - aligned)).square().sum() / (finetuned - aligned).square().sum())
    assert found.utility_loss == pytest.approx(lost, rel=1e-9, abs=1e-12)
    own = finetuned - aligned
    assert found.kept_energy == pytest.approx(
        float((delta * own).sum() / own.square().sum()), rel=1e-9, abs=1e-9
    )
    assert found.kept_entries == torch.equal(found.weight, finetuned)


@given(layers(), st.floats(0, 3))
def test_resta_is_the_papers_equation(layer, gamma):
    aligned, finetuned, unaligned, _ = layer
    found = resta(finetuned, aligned - unaligned, gamma=gamma)
    expected = finetuned.numpy() + gamma * (aligned.numpy() - unaligned.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(layers())
def test_a_low_threshold_or_no_vector_gives_the_finetuned_weight(layer):
    aligned, finetuned, safe, pretrained = (each.float() for each in layer)
    for threshold in (-1.0, 0.0):
        kept = safe_lora(aligned, finetuned, pretrained, threshold=threshold)
        merged = safe_merge(aligned, finetuned, safe, pretrained, threshold=threshold, alpha=0.3)
        assert torch.equal(kept.weight, finetuned)
        assert torch.equal(merged.weight, finetuned)
    assert torch.equal(resta(finetuned, safe, gamma=0), finetuned)


@given(layers(), st.floats(0.5, 20))
def test_the_similarity_does_not_depend_on_scales(layer, scale):
    aligned, finetuned, _, pretrained = layer
    one = cosine_of(aligned, finetuned, pretrained)
    larger = cosine_of(
        aligned, aligned + scale * (finetuned - aligned), aligned - scale * (aligned - pretrained)
    )
    assert larger == pytest.approx(one, abs=1e-7)


def test_inputs_keep_their_values_and_half_precision_is_solved_in_float32():
    torch.manual_seed(0)
    given_ = [torch.randn(6, 4).bfloat16() for _ in range(4)]
    before = [each.clone() for each in given_]
    aligned, finetuned, safe, pretrained = given_
    found = (
        safe_lora(aligned, finetuned, pretrained, threshold=2).weight,
        safe_lora(aligned, finetuned, pretrained, threshold=0).weight,
        safe_merge(aligned, finetuned, safe, pretrained, threshold=2, alpha=0.5).weight,
        resta(finetuned, safe, gamma=1),
    )
    for weight in found:
        assert weight.dtype == torch.float32
        weight.zero_()
    assert all(torch.equal(one, other) for one, other in zip(given_, before, strict=True))


def test_blocks_of_rows_give_what_the_whole_matrix_gives(monkeypatch):
    torch.manual_seed(1)
    aligned, finetuned, safe, pretrained = (torch.randn(8, 5).double() for _ in range(4))

    def solved():
        return (
            safe_lora(aligned, finetuned, pretrained, threshold=2),
            safe_lora(aligned, finetuned, pretrained, threshold=0),
            safe_merge(aligned, finetuned, safe, pretrained, threshold=2, alpha=0.3),
        )

    whole = solved()
    monkeypatch.setattr(solution, "ROW_BLOCK_ENTRIES", 15)
    for one, other in zip(solved(), whole, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=1e-12)
        assert one.utility_loss == pytest.approx(other.utility_loss, rel=1e-12)
        assert one.detail == pytest.approx(other.detail, rel=1e-12)


def test_a_delta_of_zero_stays_and_one_outside_of_the_subspace_goes():
    aligned, zero = torch.eye(3), torch.zeros(3, 3)
    assert cosine_of(aligned, aligned, zero) == 1
    assert torch.equal(safe_lora(aligned, aligned, zero, threshold=0.9).weight, aligned)
    finetuned = aligned + torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 3]])
    outside = aligned - torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    for pretrained in (outside, aligned):  # orthogonal to the delta; a layer that alignment did not change
        assert cosine_of(aligned, finetuned, pretrained) == 0
        assert torch.equal(safe_lora(aligned, finetuned, pretrained, threshold=0.1).weight, aligned)


def test_unfit_inputs_are_refused():
    one, other = torch.zeros(2, 3), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"aligned weight is \(2, 3\) and the pretrained one \(3, 2\)"):
        safe_lora(one, one, other, threshold=0)
    with pytest.raises(ValueError, match="fine-tuned weight holds 6 entries"):
        safe_lora(one, one + math.nan, one, threshold=0)
    with pytest.raises(ValueError, match="safe weight holds NaN"):
        safe_merge(one, one, one + math.nan, one, threshold=0, alpha=0.5)
    with pytest.raises(ValueError, match="threshold is NaN"):
        safe_lora(one, one, one, threshold=math.nan)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        safe_merge(one, one, one, one, threshold=0, alpha=1.5)
    with pytest.raises(ValueError, match="safety vector"):
        resta(one, other, gamma=1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        resta(one, one + math.inf, gamma=1)
    for gamma in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma is"):
            resta(one, one, gamma=gamma)
