"""About how long each step takes next to the others, so that one progress bar can tell the time left.

A unit is a billion floating-point operations of a matrix product. One distance of k-means costs as much as about fifty of
them, on a CPU and on a GPU: it ends in a comparison, not in a multiply-add.
"""

from __future__ import annotations

from vptq.pipeline.plan import LinearPlan, RunPlan

UNIT = 1e9
DISTANCE_COST = 50.0
USUAL_ITERATIONS = 0.7  # of --kiter, before --ktol stops it


def linear_units(linear: LinearPlan, kmeans_iterations: float | None = None) -> float:
    """k-means, sweep and factorisation of one linear. kmeans_iterations: what each k-means took, if that is known."""
    config, geometry = linear.config, linear.layer.geometry
    iterations = config.kiter * USUAL_ITERATIONS if kmeans_iterations is None else kmeans_iterations
    stages = [config.num_centroids[1]] + ([config.num_res_centroids[1]] if config.has_residual else [])
    searches = 1 if config.is_shared else iterations + 3
    searches = (2 if config.has_trellis else searches) + config.refine_iters
    distances = sum(geometry.num_vectors * k * searches for k in stages)
    products = 4.0 * len(stages) * geometry.out_features * geometry.in_features**2 + 3.0 * geometry.in_features**3
    return (DISTANCE_COST * distances + products) / UNIT


def forward_units(plan: RunPlan, block: int, num_tokens: int) -> float:
    """One block over some tokens."""
    weights = sum(linear.bits.num_weights for linear in plan.of_block(block))
    return 2.0 * weights * num_tokens / UNIT


def fisher_units(plan: RunPlan, num_tokens: int) -> float:
    """The gradients of all linears: forward, forward again, and backward, which costs two of these."""
    blocks = {linear.info.block for linear in plan.linears}
    return 4 * sum(forward_units(plan, block, num_tokens) for block in blocks)


def hessian_units(plan: RunPlan, block: int, num_tokens: int) -> float:
    """The Hessians of one block, next to its forward pass; at most one a linear."""
    sizes = {linear.info.in_features for linear in plan.of_block(block)}
    return sum(4.0 * size**2 * num_tokens for size in sizes) / UNIT
