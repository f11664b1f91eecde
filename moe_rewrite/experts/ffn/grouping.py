"""Which hidden units of a feed-forward form an expert: groups of equal size.

Shapes: H hidden units, T calibration rows, E experts, the shared ones first.
"""

from __future__ import annotations

import torch

from ..carved import CarvedExperts

ROUNDS = 10  # of k-means at most
STARTS = 3  # of k-means, of which the best grouping is kept
LARGE = 4096  # units from which one start is enough: an assignment takes a second there


def grouped(
    spec: CarvedExperts, contributions_TH: torch.Tensor, norms_H: torch.Tensor
) -> torch.Tensor:
    """(H,) int64: the hidden units expert by expert.

    contributions_TH: the norm of what each unit adds to each row's output.
    norms_H: a magnitude of each unit's weights.
    """
    units, draw = len(norms_H), torch.Generator().manual_seed(spec.seed)
    if spec.grouping == "random":
        return torch.randperm(units, generator=draw)
    if spec.grouping == "magnitude":
        return norms_H.argsort(descending=True, stable=True)
    first = spec.shared * units // spec.experts
    strongest = contributions_TH.mean(0).argsort(descending=True, stable=True)
    shared, rest = strongest[:first], strongest[first:].sort().values
    of = coactive(contributions_TH[:, rest].T, spec.experts - spec.shared, draw)
    return torch.cat([shared, rest[of.argsort(stable=True)]])


def coactive(values_NT: torch.Tensor, groups: int, draw: torch.Generator) -> torch.Tensor:
    """(N,) int64: the group of each unit, by k-means over the values that units have at the same
    rows. Each round assigns all units at once to groups of N / groups, so that the sum of products
    of units and their groups' means is largest: squared distances are smallest then too, since the
    terms of a unit or a group alone are the same for every assignment."""
    if groups == 1:
        return torch.zeros(len(values_NT), dtype=torch.int64)
    values = values_NT.float().contiguous()
    found = [_k_means(values, groups, draw) for _ in range(1 if len(values) > LARGE else STARTS)]
    return max(found, key=lambda of: float(_means(values, of, groups).square().sum()))


def _k_means(values: torch.Tensor, groups: int, draw: torch.Generator) -> torch.Tensor:
    means, of = values[_spread(values, groups, draw)], None
    for _ in range(ROUNDS):
        new = balanced(values @ means.T)
        if of is not None and torch.equal(new, of):
            break
        of, means = new, _means(values, new, groups)
    assert of is not None
    return of


def _means(values: torch.Tensor, of: torch.Tensor, groups: int) -> torch.Tensor:
    summed = values.new_zeros(groups, values.shape[1]).index_add_(0, of, values)
    return summed * (groups / len(values))


def _spread(values: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Indices to begin with: each drawn by its squared distance to the nearest before (k-means++)."""
    found = [int(torch.randint(len(values), (1,), generator=draw))]
    nearest = values.new_full((len(values),), float("inf"))
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (values - values[found[-1]]).square().sum(1))
        chance = nearest.double().cpu() + 1e-30  # units that are all alike
        found.append(int(torch.multinomial(chance, 1, generator=draw)))
    return torch.tensor(found)


def balanced(scores_NG: torch.Tensor) -> torch.Tensor:
    """(N,) int64: the group of each item, N / G items in each, with the largest sum of scores."""
    from scipy.optimize import linear_sum_assignment

    items, groups = scores_NG.shape
    places = scores_NG.double().cpu().numpy().repeat(items // groups, axis=1)
    _, place = linear_sum_assignment(places, maximize=True)
    return torch.from_numpy(place // (items // groups)).to(torch.int64)
