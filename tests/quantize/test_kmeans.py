"""Properties of weighted k-means, and its float64 twin."""

from __future__ import annotations

import pytest
import torch

from vptq.errors import NumericalError, VptqError
from vptq.quantize.assign import assign_nearest, assign_nearest_two, squared_distances
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.kmeans import _draw_start, _updated_centroids, batched_kmeans, weighted_kmeans
from vptq.quantize.layout import VectorWeights
from vptq.quantize.plain_clusters import PlainClusters, cluster_sums


def run(vectors, weights, k, *, seed=0, iterations=50, tol=0.0):
    generator = torch.Generator().manual_seed(seed)
    return weighted_kmeans(vectors, weights, k, iterations=iterations, tol=tol, generator=generator)


def brute_force_assign(vectors, centroids, weights):
    """Double loop in float64; the first of equals."""
    found = []
    for x, w in zip(vectors.double(), weights.double(), strict=True):
        costs = torch.stack([(w * (x - c) ** 2).sum() for c in centroids.double()])
        found.append(int(costs.argmin()))
    return torch.tensor(found)


def brute_force_kmeans(vectors, weights, centroids, iterations):
    """Lloyd's algorithm by the book, float64, from given centroids, without empty clusters."""
    x, w, c = vectors.double(), weights.double(), centroids.double().clone()
    for _ in range(iterations):
        a = brute_force_assign(x, c, w)
        for j in range(len(c)):
            member = a == j
            total = w[member].sum(0)
            c[j] = torch.where(total > 0, (w[member] * x[member]).sum(0) / total.clamp_min(1e-300), c[j])
    return c


@pytest.fixture
def cloud(generator):
    return torch.randn(60, 3, generator=generator), torch.rand(60, generator=generator) + 0.1


@pytest.mark.parametrize("per_element", [False, True])
def test_assign_equals_brute_force(generator, per_element, device):
    x, c = torch.randn(50, 4, generator=generator), torch.randn(9, 4, generator=generator)
    w = torch.rand(50, 4, generator=generator) if per_element else None
    expected = brute_force_assign(x, c, w if per_element else torch.ones_like(x))
    found = assign_nearest(x.to(device), c.to(device), None if w is None else w.to(device))
    assert torch.equal(found.cpu(), expected)


def test_assign_is_the_same_in_chunks(generator, monkeypatch):
    x, c = torch.randn(300, 4, generator=generator), torch.randn(20, 4, generator=generator)
    whole = assign_nearest(x, c)
    monkeypatch.setattr("vptq.quantize.assign.CPU_CHUNK_SCORES", 7 * 20)
    assert torch.equal(assign_nearest(x, c), whole)


def test_assign_takes_the_first_of_equals():
    x = torch.zeros(4, 2)
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert assign_nearest(x, c).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("per_element", [False, True])
def test_kmeans_equals_brute_force(cloud, per_element, generator):
    x, w = cloud
    w = torch.rand(60, 3, generator=generator) + 0.1 if per_element else w
    start = _draw_start(x, VectorWeights.of(w, 3), 4, torch.Generator().manual_seed(0))
    wide = w if per_element else w[:, None].expand(-1, 3)
    expected = brute_force_kmeans(x, wide, start, 5)
    assert torch.allclose(run(x, w, 4, iterations=5).centroids.double(), expected, atol=1e-5)


def test_objective_is_the_weighted_error_and_never_rises(cloud, device):
    x, w = (t.to(device) for t in cloud)
    found = run(x, w, 6)
    assert all(b <= a for a, b in zip(found.objective, found.objective[1:], strict=False))
    assert found.iterations >= 2
    error = (w.double() * (x - found.centroids[found.assignments]).double().square().sum(1)).sum().item()
    assert found.objective[-1] == pytest.approx(error, rel=1e-5)


def test_assignments_are_nearest_to_the_returned_centroids(cloud):
    x, w = cloud
    found = run(x, w, 6, iterations=3)
    assert torch.equal(found.assignments.long(), assign_nearest(x, found.centroids))


def test_more_centroids_are_never_worse(cloud):
    x, w = cloud
    objectives = [run(x, w, k).objective[-1] for k in (2, 4, 8, 16)]
    assert objectives == sorted(objectives, reverse=True)


def test_weight_three_equals_the_row_three_times(cloud):
    x, _ = cloud
    weights = torch.ones(60)
    weights[:10] = 3
    start = x[:5]
    a = assign_nearest(x, start)
    errors = squared_distances(x, start, a) * weights
    repeated = torch.cat([x, x[:10], x[:10]])
    a_repeated = torch.cat([a, a[:10], a[:10]])
    sums, totals = cluster_sums(x, VectorWeights.of(weights, 3), a, 5)
    sums_r, totals_r = cluster_sums(repeated, VectorWeights.of(torch.ones(80), 3), a_repeated, 5)
    assert torch.allclose(sums, sums_r) and torch.allclose(totals, totals_r)
    assert errors.sum() == pytest.approx(squared_distances(repeated, start, a_repeated).sum().item(), rel=1e-5)


def test_weight_zero_equals_the_row_removed(cloud):
    x, w = cloud
    w = w.clone()
    w[30:] = 0
    with_zeros = run(x, w, 4)
    a = assign_nearest(x[:30], with_zeros.centroids)
    sums, totals = cluster_sums(x[:30], VectorWeights.of(w[:30], 3), a, 4)
    assert torch.allclose(with_zeros.centroids.double(), sums / totals, atol=1e-5)


def test_scaling_all_weights_changes_nothing(cloud):
    x, w = cloud
    assert torch.allclose(run(x, w, 5).centroids, run(x, w * 1024, 5).centroids, atol=1e-6)


@pytest.mark.parametrize("shape", [(60,), (60, 3)])
def test_same_seed_gives_the_same_bits(cloud, shape, device, generator):
    x = cloud[0].to(device)
    w = (torch.rand(shape, generator=generator) + 0.1).to(device)
    first, second = run(x, w, 6, seed=3), run(x, w, 6, seed=3)
    assert torch.equal(first.centroids, second.centroids) and first.objective == second.objective
    assert not torch.equal(first.centroids, run(x, w, 6, seed=4).centroids)


def test_tol_stops_early(cloud):
    x, w = cloud
    assert run(x, w, 6, tol=0.5).iterations < run(x, w, 6, tol=0.0).iterations


def test_an_update_that_rounding_makes_worse_is_dropped(cloud, monkeypatch):
    import vptq.quantize.kmeans as kmeans

    x, w = cloud
    real, calls = kmeans._updated_centroids, []

    def worse_the_third_time(*args):
        calls.append(1)
        return real(*args) + (10.0 if len(calls) == 3 else 0.0)

    monkeypatch.setattr(kmeans, "_updated_centroids", worse_the_third_time)
    found = run(x, w, 6)
    assert found.iterations == 2
    error = (w.double() * (x - found.centroids[found.assignments]).double().square().sum(1)).sum().item()
    assert found.objective[-1] == pytest.approx(error, rel=1e-5)
    assert torch.equal(found.assignments.long(), assign_nearest(x, found.centroids))
    assert all(b <= a for a, b in zip(found.objective, found.objective[1:], strict=False))


def test_fixed_point_sums_equal_float64_sums(cloud, generator):
    x, w = cloud
    a = torch.arange(60) % 7
    weights = VectorWeights(w[:40], torch.rand(20, 3, generator=generator))
    fixed = FixedPointSums.empty(x[None], VectorWeights.stack([weights]), 7)
    for run_, part in weights.parts():
        fixed.add(0, a[run_], x[run_], part)
    for found, expected in zip(fixed.decode(), cluster_sums(x, weights, a, 7), strict=True):
        assert torch.allclose(found[0], expected, rtol=0, atol=1e-9)


def test_fixed_point_sums_do_not_overflow():
    x = torch.full((1000, 1), 3e38)
    weights = VectorWeights.of(torch.ones(1000), 1)
    fixed = FixedPointSums.empty(x[None], VectorWeights.stack([weights]), 1)
    fixed.add(0, torch.zeros(1000, dtype=torch.int64), x, weights.whole)
    assert fixed.decode()[0].item() == pytest.approx(3e41, rel=1e-6)


def test_empty_cluster_moves_to_the_worst_vector():
    x = torch.tensor([[0.0], [0.1], [5.0]])
    clusters = PlainClusters(x[None], VectorWeights.stack([VectorWeights.of(torch.ones(3), 1)]), 2)
    clusters.assign(torch.tensor([[[1.0], [100.0]]]), [0])
    assert clusters.measure([0])[0][1] == 1
    moved = _updated_centroids(clusters, torch.tensor([[[1.0], [100.0]]]), {0: 1})[0]
    assert moved[1].item() == 5.0 and moved[0].item() == pytest.approx(1.7)


def test_a_batch_gives_what_each_gives_alone(generator):
    x, w = torch.randn(4, 80, 3, generator=generator), torch.rand(4, 80, generator=generator)
    x[1] = x[1].round()  # stops early
    seeds = range(4)
    alone = [run(x[b], w[b], 6, seed=b, tol=1e-4) for b in seeds]
    batch = VectorWeights.stack([VectorWeights.of(entry, 3) for entry in w])
    generators = [torch.Generator().manual_seed(b) for b in seeds]
    together = batched_kmeans(x, batch, 6, iterations=50, tol=1e-4, generators=generators)
    assert len({found.iterations for found in alone}) > 1
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.centroids, other.centroids) and one.objective == other.objective
        assert torch.equal(one.assignments, other.assignments)


def test_padded_vectors_weigh_only_where_they_are(generator):
    """A run of whole vectors and some padded ones give what a weight for every element gives."""
    x, w = torch.randn(50, 3, generator=generator), torch.rand(50, generator=generator) + 0.1
    wide = w[:, None].repeat(1, 3)
    wide[40:, 2] = 0
    mixed = VectorWeights.stack([VectorWeights(w[:40], wide[40:])])
    generators = [torch.Generator().manual_seed(0)]
    found = batched_kmeans(x[None], mixed, 5, iterations=20, tol=0.0, generators=generators)[0]
    expected = run(x, wide, 5, iterations=20)
    assert torch.allclose(found.centroids, expected.centroids, atol=1e-5)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 9])
def test_fewer_vectors_than_centroids_repeat_without_loss(generator, k):
    x = torch.randn(5, 2, generator=generator)
    found = run(x, torch.ones(5), k)
    assert torch.isfinite(found.centroids).all() and found.centroids.shape == (k, 2)
    if k >= 5:
        assert found.objective[-1] == 0


def test_equal_rows_and_zero_weights_stay_finite():
    same = run(torch.ones(20, 2), torch.ones(20), 4)
    assert torch.isfinite(same.centroids).all() and same.objective[-1] == 0
    assert torch.isfinite(run(torch.randn(20, 2), torch.zeros(20), 4).centroids).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_raises(bad):
    x = torch.zeros(4, 2)
    x[2, 1] = bad
    with pytest.raises(NumericalError, match="non-finite"):
        run(x, torch.ones(4), 2)


def test_wrong_shapes_raise():
    with pytest.raises(VptqError, match="one weight a vector"):
        run(torch.zeros(4, 2), torch.ones(3), 2)


def test_arguments_are_not_changed(cloud):
    x, w = cloud
    kept = x.clone(), w.clone()
    run(x, w, 5)
    assert torch.equal(x, kept[0]) and torch.equal(w, kept[1])


@pytest.mark.parametrize("per_element", [False, True])
def test_vectors_that_are_not_searched_again_are_where_a_search_would_put_them(per_element, generator):
    x = torch.randn(1, 3000, 3, generator=generator)
    w = torch.rand(1, 3000, 3, generator=generator) + 0.1
    weights = VectorWeights(w[:, :0, 0], w) if per_element else VectorWeights(w[:, :, 0], w[:, :0])
    clusters, searched = PlainClusters(x, weights, 20), []
    centroids = x[:, :20].clone()
    for number in range(25):
        before = clusters._bounds.clone()
        clusters.assign(centroids, [0])
        expected = assign_nearest(x[0], centroids[0], w[0] if per_element else None)
        assert torch.equal(clusters.assignments[0].long(), expected)
        distances = squared_distances(x[0], centroids[0], expected, w[0] if per_element else None)
        assert torch.allclose(clusters.errors[0], distances if per_element else distances * w[0, :, 0], rtol=1e-5)
        searched.append((clusters._bounds > before).float().mean().item())
        centroids = clusters.means(centroids, [0])
        if number == 12:
            centroids[0, 4] += 3.0  # as an empty cluster does
    assert searched[0] > 0.9 and searched[11] < 0.7


def test_bound_is_never_more_than_the_distance_to_the_second_nearest(generator):
    x, c = torch.randn(500, 5, generator=generator) + 30, torch.randn(40, 5, generator=generator) + 30
    w = torch.rand(500, 5, generator=generator)
    for weights in (None, w):
        _, bound = assign_nearest_two(x, c, weights)
        wide = torch.ones_like(x) if weights is None else weights
        exact = torch.stack([(wide.double() * (x - one).double().square()).sum(1) for one in c], 1).sort(1).values[:, 1].sqrt()
        assert (bound <= exact).all() and (bound > 0.5 * exact).float().mean() > 0.9
