"""Sums over the tokens of one expert, and how they are shrunk towards those of all experts of its block."""

from dataclasses import replace

import pytest
import torch

from deltaguard.curvature.routed import Pool, RoutedMoment, input_sum, shrunk_sums
from deltaguard.curvature.sums import LayerGroup, LinearLayer, RunningMoment

GROUP = LayerGroup("e", 6, 100, (LinearLayer("e.weight", transposed=False, out_features=6),))


def vectors(count, seed, size=6):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def routed(counts, seed=0):
    """The sums of experts that so many tokens reach, of one pool."""
    pool = Pool(6, experts=len(counts))
    found = []
    for expert, count in enumerate(counts):
        found.append(RoutedMoment(pool))
        found[-1].add(vectors(count, seed + expert))
    return found


@pytest.mark.parametrize("batches", [(), (2,), (2, 3), (4, 0, 4), (9,), (3, 3, 3, 3)])
def test_the_sum_is_the_same_whether_tokens_are_kept_or_added_up(batches):
    pool, expected = Pool(6, experts=1), RunningMoment(6)
    expert = RoutedMoment(pool)
    for number, count in enumerate(batches):
        expert.add(vectors(count, number))
        expected.add(vectors(count, number))
    total = expected.taken().total
    torch.testing.assert_close(expert.total(6), total)
    torch.testing.assert_close(pool.moment.total, total)
    assert expert.tokens == pool.moment.tokens == sum(batches)


def test_no_more_is_held_than_the_smaller_of_tokens_and_sum():
    (few, many) = routed([5, 7])
    assert sum(map(len, few._kept)) == 5
    assert few._running is None
    assert many._kept == []
    assert many._running is not None


def test_half_precision_is_kept_as_it_is_and_added_in_single():
    rows = vectors(4, 0).bfloat16()
    expert = RoutedMoment(Pool(6, experts=1))
    expert.add(rows)
    assert expert._kept[0].dtype == torch.bfloat16
    torch.testing.assert_close(expert.total(6), rows.float().T @ rows.float())


def test_an_expert_that_no_token_reaches_counts_as_the_mean_one():
    counts = (40, 8, 0)
    inputs, outputs = routed(counts), routed(counts, seed=10)
    found = shrunk_sums(GROUP, inputs[2], [outputs[2]])
    torch.testing.assert_close(found.inputs.total / 100, inputs[2].pool.moment.total / 48)
    torch.testing.assert_close(found.outputs[0], outputs[2].pool.moment.total / 3)
    assert (found.reached.tokens, found.reached.pooled) == (0, (1, 1))


def test_the_more_tokens_the_more_an_expert_counts_by_its_own():
    inputs = routed((2, 20, 2000))
    shares = [shrunk_sums(GROUP, each, [each]).reached.pooled[0] for each in inputs]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5 > shares[1]
    assert shares[2] < 0.01
    own = inputs[2].total(6) / 2000
    found = shrunk_sums(GROUP, inputs[2], [inputs[2]]).inputs.total / 100
    torch.testing.assert_close(found, own, rtol=0, atol=0.02 * float(own.max()))


def test_with_as_many_tokens_as_directions_both_count_half():
    """The rule's reason: the mean over d + 1 tokens is off by about as much as it says, relative to each."""
    assert Pool(6, experts=1).share(7) == 0.5
    assert Pool(6, experts=1).share(0) == 1


@pytest.mark.parametrize("tokens", [20, 80])
def test_directions_that_no_token_of_an_expert_went_along_are_not_cheap(tokens):
    """Though a strong mean, as inputs have one, makes up most of what all experts were given."""
    size, mu = 64, 10.0
    generator = torch.Generator().manual_seed(tokens)
    mean, pool = torch.full((size,), 1.5), Pool(size, experts=4)
    experts = [RoutedMoment(pool) for _ in range(4)]
    for expert, count in zip(experts, (tokens, 4000, 4000, 4000), strict=True):
        expert.add(mean + torch.randn(count, size, generator=generator))
    truth = (mean[:, None] * mean + torch.eye(size)).double()
    group = replace(GROUP, in_features=size)
    delta = torch.randn(size, size, generator=generator).double()

    def lost(H):
        """The safety that the closed form gives away with a curvature, by the true one."""
        kept = delta @ torch.linalg.inv(torch.eye(size, dtype=torch.float64) + mu * H)
        return float(torch.trace(kept @ truth @ kept.T))

    found = input_sum(group, experts[0])[0]
    assert lost(found.total.double() / group.tokens) < 2 * lost(truth)
