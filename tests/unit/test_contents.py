"""What a store keeps of a group: how much of it, under which names, in how many bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.curvature.contents import (
    Extent,
    Form,
    group_curvature,
    share_within,
    spectra_bytes,
    stored_bytes,
    stored_forms,
    stored_tensors,
)
from deltaguard.curvature.sums import LayerGroup, LinearLayer, Moment, Sums
from deltaguard.errors import DeltaguardError

SIZES = st.integers(1, 12)
EXTENTS = st.builds(Extent, share=st.floats(0.01, 1), full=st.booleans())


@st.composite
def groups(draw):
    outputs = draw(st.lists(SIZES, min_size=1, max_size=3))
    layers = tuple(LinearLayer(f"a.{i}.weight", False, size) for i, size in enumerate(outputs))
    return LayerGroup("a.0", draw(SIZES), 40, layers)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(size, tokens=40):
    x = normal(tokens, size, seed=size)
    return x.T @ x


def sums(group):
    return Sums(Moment(moment(group.in_features), 40), tuple(moment(x.out_features) for x in group.layers))


def curvature(group, extent, *, response_tokens=8, found=None):
    return group_curvature(
        group, found or sums(group), response_tokens=response_tokens, dampening=0.01, extent=extent
    )


@given(groups(), EXTENTS)
def test_what_is_stored_has_the_shapes_and_bytes_that_were_planned(group, extent):
    tensors = stored_tensors(group, curvature(group, extent), extent)
    assert {name: Form(x.dtype, tuple(x.shape)) for name, x in tensors.items()} == stored_forms(group, extent)
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes(group, extent)
    vectors = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".vectors"))
    assert vectors == spectra_bytes(group, extent)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@given(st.lists(groups(), min_size=1, max_size=4), st.integers(1, 3000))
def test_eigenvectors_take_no_more_than_the_limit_where_one_each_fits(made, limit):
    extent = Extent(share_within(made, limit), full=False)
    taken = sum(spectra_bytes(group, extent) for group in made)
    one_each = sum(spectra_bytes(group, Extent(1e-9, full=False)) for group in made)
    assert taken <= limit + one_each
    if extent.share == 1:
        assert taken == 2 * sum(g.in_features**2 + sum(x.out_features**2 for x in g.layers) for g in made)


def test_the_share_is_that_of_the_bytes():
    group = LayerGroup(
        "a.0", 300, 40, (LinearLayer("a.0.weight", False, 400), LinearLayer("a.1.weight", False, 500))
    )
    entries = 300**2 + 400**2 + 500**2
    assert share_within([group], entries) == 0.5
    assert share_within([group, group], entries) == 0.25
    assert share_within([group], 9 * entries) == 1
    half = Extent(0.5, full=False)
    assert [half.rank(size) for size in (1, 3, 300, 401)] == [1, 1, 150, 200]
    assert spectra_bytes(group, half) == entries
    assert Extent(0.5, full=True).rank(300) == 300


def test_h_is_a_mean_over_all_tokens_and_g_over_those_of_responses():
    group = LayerGroup("a.0", 4, 40, (LinearLayer("a.0.weight", False, 3),))
    found = curvature(group, Extent(1, full=True), response_tokens=8)
    torch.testing.assert_close(found.inputs.spectrum.dense(), moment(4) / 40)
    torch.testing.assert_close(found.outputs[0].spectrum.dense(), moment(3) / 8)
    assert found.inputs.mean == pytest.approx(float((moment(4) / 40).trace()) / 4)
    assert found.outputs[0].mean == pytest.approx(float((moment(3) / 8).trace()) / 3)
    assert torch.equal(found.totals[0], moment(3))
    cut = curvature(group, Extent(0.5, full=False))
    assert (cut.packed, cut.totals) == (None, ())
    # The mean is that of all eigenvalues, those that are not kept too.
    assert cut.outputs[0].mean == found.outputs[0].mean


@pytest.mark.parametrize("whole", [True, False])
def test_a_sum_of_no_use_names_the_layer(whole):
    group = LayerGroup(
        "a.0", 4, 40, (LinearLayer("a.0.weight", False, 3), LinearLayer("a.1.weight", False, 2))
    )
    bad = moment(2)
    bad[0, 1] = torch.nan
    inputs, (first, _) = sums(group).inputs, sums(group).outputs
    with pytest.raises(DeltaguardError, match=r"`a\.1` holds 1 entries .* gradients overflow"):
        curvature(group, Extent(1, full=whole), found=Sums(inputs, (first, bad)))
    with pytest.raises(DeltaguardError, match=r"`a\.0` is zero"):
        curvature(group, Extent(1, full=whole), found=Sums(Moment(torch.zeros(4, 4), 40), (first, moment(2))))


def test_a_layer_that_no_gradient_reached_is_not_taken_for_a_free_one():
    group = LayerGroup("a.0", 4, 40, (LinearLayer("a.0.weight", False, 3),))
    sums = Sums(Moment(moment(4), 40), (torch.zeros(3, 3),))
    with pytest.raises(DeltaguardError, match=r"`a\.0` is zero: its gradients are all zero"):
        curvature(group, Extent(0.4, full=False), found=sums)


@pytest.mark.parametrize("whole", [True, False])
def test_a_sum_with_negative_eigenvalues_names_the_layer(whole):
    group = LayerGroup(
        "a.0", 4, 40, (LinearLayer("a.0.weight", False, 3), LinearLayer("a.1.weight", False, 2))
    )
    inputs, (first, second) = sums(group).inputs, sums(group).outputs
    second[0, 1] = second[1, 0] = 3 * float(second.trace())
    with pytest.raises(DeltaguardError, match=r"`a\.1` is of no use: .* not positive semi-definite"):
        curvature(group, Extent(0.5, full=whole), found=Sums(inputs, (first, second)))
