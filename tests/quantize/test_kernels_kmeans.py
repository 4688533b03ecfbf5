"""The k-means kernels against float64 and against their twin: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from vptq.backend import use_kernels
from vptq.errors import UsageError
from vptq.quantize.clusters import find_nearest, make_clusters
from vptq.quantize.kmeans import batched_kmeans
from vptq.quantize.layout import VectorWeights
from vptq.quantize.plain_clusters import PlainClusters

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's
ON_GPU = torch.cuda.is_available()
VECTORS = 4096 if ON_GPU else 160


def cloud(n, v, k, generator, device, *, weighted=False):
    x = torch.randn(n, v, generator=generator)
    c = 0.95 * torch.randn(k, v, generator=generator)
    weights = torch.rand(n, v, generator=generator) * 4 - 2 if weighted else torch.rand(n, generator=generator) - 1
    return x.to(device), VectorWeights.of(weights.exp().to(device), v), c.to(device)


def exact_errors(x, weights, c):
    """Weighted squared distances in float64: (n, k)."""
    w = torch.cat([weights.whole[:, None].expand(-1, x.shape[1]), weights.ragged]).double()
    middle = x.double().mean(0)
    x, c = x.double() - middle, c.double() - middle
    return (w * x.square()).sum(1, keepdim=True) - 2 * (w * x) @ c.T + w @ c.square().T


SHAPES = [(2, 5), (2, 300), (3, 64), (4, 256), (5, 130), (6, 600), (7, 31), (8, 1024), (12, 200), (13, 128), (16, 257)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("v", "k"), SHAPES + ([(6, 4096), (8, 65536), (2, 16384), (16, 65536)] if ON_GPU else []))
def test_assignment_costs_what_float64_assignment_costs(v, k, weighted, generator, kernel_device):
    x, weights, c = cloud(VECTORS, v, k, generator, kernel_device, weighted=weighted)
    found = find_nearest(x, weights, c)
    errors = exact_errors(x, weights, c)
    assert found.min() >= 0 and found.max() < k
    best = errors.amin(1).sum().item()
    assert errors.gather(1, found[:, None]).sum().item() <= best * (1 + 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_of_equals_wins(weighted, generator, kernel_device):
    x, weights, c = cloud(VECTORS, 4, 300, generator, kernel_device, weighted=weighted)
    c[7] = c[6]
    c[150:] = c[:150].flip(0)  # every centroid twice, in different groups
    found = find_nearest(x, weights, c)
    assert found.max() < 150 and not (found == 7).any()


@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_size_and_offset_of_the_data_do_not_matter(scale, shift, generator, kernel_device):
    x, weights, c = cloud(VECTORS, 6, 200, generator, kernel_device)
    x, c = x * scale + shift * scale, c * scale + shift * scale
    errors = exact_errors(x, weights, c)
    found = find_nearest(x, weights, c)
    assert errors.gather(1, found[:, None]).sum().item() <= errors.amin(1).sum().item() * (1 + 1e-5)


def test_vectors_far_from_all_others_find_theirs(generator, kernel_device):
    x, weights, c = cloud(VECTORS, 4, 64, generator, kernel_device)
    x[3], x[9] = 5e4, -7e5
    c[20], c[30] = 4e4, -6e5
    found = find_nearest(x, weights, c)
    assert found[3] == 20 and found[9] == 30
    errors = exact_errors(x, weights, c)
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rest[[3, 9]] = False
    assert errors.gather(1, found[:, None])[rest].sum() <= errors.amin(1)[rest].sum() * (1 + 1e-5)


def mixed_batch(generator, device, entries=3, n=VECTORS):
    """A batch whose last vectors are padded."""
    x = torch.randn(entries, n, 6, generator=generator).to(device)
    w = torch.rand(entries, n, generator=generator).to(device) + 0.1
    ragged = w[:, n - 30 :, None].repeat(1, 1, 6)
    ragged[:, :, 4:] = 0
    return x, VectorWeights(w[:, : n - 30].contiguous(), ragged)


def test_state_equals_the_twins(generator, kernel_device):
    x, weights = mixed_batch(generator, kernel_device)
    x[1, 5] = 3e4  # too far out for float16
    centroids = x[:, 10:50].contiguous()
    fast, plain = make_clusters(x, weights, 40), PlainClusters(x, weights, 40)
    assert type(fast) is not type(plain)
    for clusters in (fast, plain):
        clusters.assign(centroids, [0, 1, 2])
    assert (fast.assignments != plain.assignments).float().mean() < 0.01
    assert torch.allclose(fast.errors, plain.errors, rtol=1e-3, atol=1e-4)
    plain.assignments, plain._sums = fast.assignments, [None] * 3
    moved, expected = fast.means(centroids, [0, 2]), plain.means(centroids, [0, 2])
    assert torch.allclose(moved, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(moved[1], centroids[1]) and not torch.equal(moved[0], centroids[0])
    assert all(torch.equal(fast.empty(b), plain.empty(b)) for b in range(3))
    for (objective, empty), (expected, also_empty) in zip(fast.measure([0, 1, 2]), plain.measure([0, 1, 2]), strict=True):
        assert objective == pytest.approx(expected, rel=1e-5) and empty == also_empty


def test_only_active_entries_change(generator, kernel_device):
    x, weights = mixed_batch(generator, kernel_device)
    clusters = make_clusters(x, weights, 8)
    clusters.assign(x[:, :8].contiguous(), [0, 1, 2])
    before = clusters.assignments.clone()
    clusters.assign(x[:, 8:16].contiguous(), [1])
    assert torch.equal(clusters.assignments[[0, 2]], before[[0, 2]])
    assert not torch.equal(clusters.assignments[1], before[1])


def kmeans_of(x, weights, k, monkeypatch, kernels):
    monkeypatch.setenv("VPTQ_KERNELS", kernels)
    generators = [torch.Generator().manual_seed(b) for b in range(len(x))]
    return batched_kmeans(x, weights, k, iterations=6, tol=1e-4, generators=generators)


@pytest.mark.ci
def test_kmeans_reaches_the_twins_objective(generator, kernel_device, monkeypatch):
    x, weights = mixed_batch(generator, kernel_device)
    fast = kmeans_of(x, weights, 20, monkeypatch, "triton")
    plain = kmeans_of(x, weights, 20, monkeypatch, "torch")
    for one, other in zip(fast, plain, strict=True):
        assert one.objective[-1] == pytest.approx(other.objective[-1], rel=5e-3)
        assert all(b <= a for a, b in zip(one.objective, one.objective[1:], strict=False))


@pytest.mark.ci
def test_a_batch_gives_the_bits_that_each_gives_alone(generator, kernel_device, monkeypatch):
    x, weights = mixed_batch(generator, kernel_device)
    together = kmeans_of(x, weights, 20, monkeypatch, "triton")
    again = kmeans_of(x, weights, 20, monkeypatch, "triton")
    alone = kmeans_of(x[:1].contiguous(), VectorWeights.stack([weights.entry(0)]), 20, monkeypatch, "triton")
    assert torch.equal(together[0].centroids, alone[0].centroids) and together[0].objective == alone[0].objective
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one.centroids, other.centroids) and torch.equal(one.assignments, other.assignments)


def test_the_variable_chooses(monkeypatch):
    monkeypatch.setenv("VPTQ_KERNELS", "torch")
    assert not use_kernels(torch.device("cuda"))
    monkeypatch.delenv("VPTQ_KERNELS")
    assert not use_kernels(torch.device("cpu"))
    monkeypatch.setenv("VPTQ_KERNELS", "fast")
    with pytest.raises(UsageError, match="VPTQ_KERNELS is `fast`"):
        use_kernels(torch.device("cpu"))
    monkeypatch.setenv("VPTQ_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="the work is on `cpu`"):
        use_kernels(torch.device("cpu"))


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_an_entry_that_ends_by_rounding_leaves_the_others_alone(kernels, generator, kernel_device, monkeypatch):
    """The second step of entry 0 is spoiled, so that its objective rises: entry 1 must go on as it does alone."""
    import vptq.quantize.kmeans as kmeans

    x = torch.randn(2, VECTORS, 3, generator=generator).to(kernel_device)
    weights = VectorWeights(torch.ones(2, VECTORS, device=kernel_device), x[:, :0])
    alone = kmeans_of(x, weights, 6, monkeypatch, kernels)[1]
    real, calls = kmeans._updated_centroids, []

    def spoiled(clusters, centroids, num_empty):
        calls.append(1)
        moved = real(clusters, centroids, num_empty)
        if len(calls) == 2:
            moved[0] += 10.0
        return moved

    monkeypatch.setattr(kmeans, "_updated_centroids", spoiled)
    first, second = kmeans_of(x, weights, 6, monkeypatch, kernels)
    assert first.iterations == 1 and second.iterations == alone.iterations > 2
    assert torch.equal(second.centroids, alone.centroids) and second.objective == alone.objective


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [20, 40, 60, 75, 90, 120, 150, 300])
def test_vectors_about_the_limit_of_float16_find_theirs(size, weighted, generator, kernel_device):
    x, weights, c = cloud(VECTORS, 4, 300, generator, kernel_device, weighted=weighted)
    x[5], x[6] = 0.0, 0.0
    x[5, 0], x[6, 1] = size, -size
    c[17], c[18] = x[5] * 1.01, x[6] * 1.01
    found = find_nearest(x, weights, c)
    assert found[5] == 17 and found[6] == 18


def test_heavy_tails_cost_no_more(generator, kernel_device):
    x, weights, c = cloud(VECTORS, 8, 300, generator, kernel_device)
    x[::5] *= 30 * torch.rand(len(x[::5]), 1, generator=generator).to(kernel_device)
    c[::5] *= 30 * torch.rand(len(c[::5]), 1, generator=generator).to(kernel_device)
    errors = exact_errors(x, weights, c)
    found = find_nearest(x, weights, c)
    assert errors.gather(1, found[:, None]).sum().item() <= errors.amin(1).sum().item() * (1 + 1e-5)


def test_a_trial_says_whether_kernels_run(kernel_device, monkeypatch):
    from vptq.quantize.trial import _fault

    assert _fault(kernel_device) == ""
    monkeypatch.setattr("vptq.quantize.kernels.clusters.vector_rows", lambda *_: 1 / 0)
    assert _fault(kernel_device) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("weighted", [False, True])
def test_the_last_centroid_stays_where_it_is_nearer(weighted, generator, kernel_device, monkeypatch):
    """A first pass that finds the wrong group can't make things worse than they were."""
    import vptq.quantize.kernels.clusters as clusters_module

    x, weights, c = cloud(VECTORS, 5, 600, generator, kernel_device, weighted=weighted)
    clusters = make_clusters(x[None], VectorWeights.stack([weights]), 600)
    clusters.assign(c[None], [0])
    assigned, errors = clusters.assignments.clone(), clusters.errors.clone()
    monkeypatch.setattr(clusters_module, "best_groups", lambda rows, centroids, active, groups, layout: groups.zero_())
    clusters.assign(c[None], [0])
    assert torch.equal(clusters.assignments, assigned) and torch.equal(clusters.errors, errors)
