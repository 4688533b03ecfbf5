"""What a run will take, from shapes alone: time by playing its schedule through, memory, disk and network by adding up.

Time: every work is given the seconds that measured rates say, and the real schedule (`schedule.BlockWalk`) is played through
with so many workers. What is left out: norms and attention of the forward passes, and waiting for the disk.
Memory: the largest of what a worker holds while it calibrates and while it quantizes; bytes of the second were found by
measuring linears of 4096 to 28672 inputs, with codebooks of their own (docs/scaling.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vptq.calibration.hessian import BlockSums
from vptq.calibration.runs import MOST_RUNS, share_runs
from vptq.checkpoint.writer import MAX_SHARD_BYTES
from vptq.config import QuantConfig
from vptq.evaluation.perplexity import BATCH_TOKENS
from vptq.models.architecture import Skeleton
from vptq.models.device import forced_dtype
from vptq.pipeline.cost import fisher_units, forward_units, hessian_units, linear_units
from vptq.pipeline.plan import LinearPlan, RunPlan, result_bytes
from vptq.pipeline.rates import Rates
from vptq.pipeline.schedule import BlockWalk, Watch
from vptq.pipeline.stages import Passage, Quantizing, blocks_ahead, input_sizes, scratch_bytes, sums_bytes
from vptq.pipeline.works import Calibrate, QuantizeLinears, Work

FLOAT = 4
DOUBLE = 8
KMEANS_BYTES = 58  # a weight, of k-means: vectors, distances and sums beside the weight itself
SWEEP_BYTES = 8  # a weight
METRIC_BYTES = 12  # an entry of in_features x in_features, of each run of rows: Hessian, permuted, factor
FACTOR_BYTES = 15  # an entry, once: two float64 matrices while one is factored, less what comes after
PROCESS_BYTES = {"cuda": 2 << 30, "cpu": 700 << 20}  # of main memory: Python, torch, a GPU's context
SHARD_COPIES = 2  # in main memory while a shard of the checkpoint is written
BLOCKS_READ_AHEAD = 2


@dataclass(frozen=True)
class Estimate:
    """What a run takes with so many workers.

    Attributes:
        seconds: from start to checkpoint. busy: share of them that workers are at work. worker_seconds: of all, at work.
        gpu_bytes: that a worker needs at least; 0 on CPUs. main_bytes: main memory of the first process; worker_bytes:
            of a worker. disk_bytes: that results need; scratch_bytes: beside them, while the run is on.
        read_bytes: of weights and sums, by all workers; written_bytes: of sums and results.
    """

    workers: int
    seconds: float
    busy: float
    worker_seconds: float
    gpu_bytes: int
    main_bytes: int
    worker_bytes: int
    disk_bytes: int
    scratch_bytes: int
    read_bytes: int
    written_bytes: int


def estimate(
    config: QuantConfig, skeleton: Skeleton, plan: RunPlan, rates: Rates, workers: int, keeps_on_gpu: bool
) -> Estimate:
    """Work it out. keeps_on_gpu: whether hidden states have room on the GPU."""
    calibration = config.calibration
    tokens = calibration.nsamples * plan.seq_len
    runs = max(1, min(MOST_RUNS, -(-tokens // BATCH_TOKENS)))
    shares = tuple(share for share in share_runs(runs, workers) if share)
    weighted, last = calibration.hessian == "fisher", len(skeleton.blocks) - 1
    passage = Passage(skeleton, plan, tokens, shares, last, calibration.sequential, weighted=weighted)
    seconds_of = _seconds_of(passage, rates)
    seconds, worker_seconds = _play(config, passage, seconds_of, workers)
    if weighted:
        weighing = fisher_units(plan, tokens) / rates.forward_units
        seconds, worker_seconds = seconds + weighing / len(shares), worker_seconds + weighing
    if config.bits is not None:
        measuring = sum(seconds_of(work) for block in range(passage.last + 1) for work in passage.calibrate(block, True))
        seconds, worker_seconds = seconds + measuring / len(shares), worker_seconds + measuring
    results = plan.bits.file_bits // 8 if config.save_packed_model else 0
    total = seconds + rates.start_seconds + results / rates.disk_bytes
    itemsize = (forced_dtype(torch.device(rates.device)) or skeleton.dtype).itemsize
    weights = sum(linear.bits.num_weights for linear in plan.linears) * skeleton.dtype.itemsize
    handed_over = len(skeleton.blocks) * sums_bytes(passage) if workers > 1 else 0
    stored = sum(linear.bits.stored for linear in plan.everything) // 8
    block_bytes = max(_block_weights(plan, block) for block in _blocks(plan)) * itemsize
    states = -(-tokens // len(shares)) * skeleton.hidden_size * itemsize * (2 if calibration.sequential else 1)
    gpu_bytes = _gpu_bytes(passage, block_bytes, states if keeps_on_gpu or rates.device == "cpu" else 0)
    base = PROCESS_BYTES[rates.device]
    worker_bytes = base + BLOCKS_READ_AHEAD * block_bytes
    worker_bytes += gpu_bytes if rates.device == "cpu" else 0 if keeps_on_gpu else states
    shard_bytes = SHARD_COPIES * min(MAX_SHARD_BYTES, results)
    return Estimate(
        workers=workers,
        seconds=total,
        busy=worker_seconds / (workers * total),
        worker_seconds=worker_seconds,
        gpu_bytes=0 if rates.device == "cpu" else gpu_bytes,
        main_bytes=max(base + shard_bytes, worker_bytes if workers == 1 else 0),
        worker_bytes=worker_bytes,
        disk_bytes=result_bytes(config, plan, weights),
        scratch_bytes=scratch_bytes(passage, workers),
        read_bytes=weights * (len(shares) + 1) + handed_over,
        written_bytes=handed_over + stored + results,
    )


def _seconds_of(passage: Passage, rates: Rates) -> Callable[[Work], float]:
    total_runs = sum(len(runs) for runs in passage.shares)

    def seconds(work: Work) -> float:
        if isinstance(work, Calibrate):
            part = len(work.runs) / total_runs
            forward = forward_units(passage.plan, work.block, passage.num_tokens) * (3 if passage.sequential else 1)
            hessians = hessian_units(passage.plan, work.block, passage.num_tokens) if work.wanted else 0.0
            return part * (forward / rates.forward_units + hessians / 2 / rates.hessian_units)  # 2: see `hessian_units`
        assert isinstance(work, QuantizeLinears)
        return sum(rates.linear_seconds + linear_units(task.plan) / rates.linear_units for task in work.batch)

    return seconds


def _play(config: QuantConfig, passage: Passage, seconds_of: Callable[[Work], float], workers: int) -> tuple[float, float]:
    """Seconds until all is done, and those of all workers at work."""
    nothing = Watch(lambda text: None, lambda units: None)
    todo = tuple(linear for linear in passage.plan.everything if not linear.layer.weight_of)
    quantizing = Quantizing(passage, todo, torch.device("cpu"), Path())
    walk = BlockWalk(quantizing.stages(), blocks_ahead(workers, passage.sequential), 1.0, nothing, lambda work, answer: None)
    now, used, free = 0.0, 0.0, set(range(workers))
    under_way: list[tuple[float, int, int, Work]] = []
    count = 0
    everybody = range(workers)
    while not walk.finished:
        for worker in sorted(free):
            work = walk.take(worker, everybody)
            if work is None:
                continue
            free.discard(worker)
            used += seconds_of(work)
            count += 1
            heapq.heappush(under_way, (now + seconds_of(work), count, worker, work))
        now, _, worker, work = heapq.heappop(under_way)
        free.add(worker)
        walk.done(work, _answer(passage, work))
    return now, used


def _answer(passage: Passage, work: Work) -> Any:
    if not isinstance(work, Calibrate):
        return None
    suffixes = [linear.info.suffix for linear in passage.plan.of_block(work.block)]
    return BlockSums({suffix: [] for suffix in suffixes}, {suffix: suffix for suffix in suffixes})


def _gpu_bytes(passage: Passage, block_bytes: int, states: int) -> int:
    """The larger of calibrating and quantizing, and what stays between the two; sums that wait go where there is room."""
    plan, sizes = passage.plan, input_sizes(passage)
    matrices = 2 if passage.sequential else 1
    batch = BATCH_TOKENS * max(max(linear.info.out_features, linear.info.in_features) for linear in plan.linears)
    calibrating = (
        block_bytes + matrices * sum(size**2 for size in sizes) * (DOUBLE + FLOAT) + 4 * batch * passage.skeleton.dtype.itemsize
    )
    quantizing = max(_quantizing_bytes(passage, linear) for linear in plan.everything if linear.bits.num_weights)
    return states + max(calibrating, quantizing)


def _quantizing_bytes(passage: Passage, linear: LinearPlan) -> int:
    """The largest of adding up what was summed over the shares, k-means, and factoring for the sweep."""
    entries, weights = linear.info.in_features**2 * linear.layer.row_groups, linear.bits.num_weights
    given = 2 if passage.sequential else 1  # matrices: the Hessian, and the drift
    adding = entries * FLOAT * given * (2 + (len(passage.shares) - 1).bit_length())
    turned = linear.config.rotation != "none" and linear.config.rotation_sides != "out"
    kept = entries * FLOAT * (given - 1 + turned)
    sweep = weights * SWEEP_BYTES + entries * METRIC_BYTES + linear.info.in_features**2 * FACTOR_BYTES
    return weights * passage.skeleton.dtype.itemsize + max(adding, kept + max(weights * KMEANS_BYTES + entries * FLOAT, sweep))


def _blocks(plan: RunPlan) -> Sequence[int]:
    return sorted({linear.info.block for linear in plan.linears})


def _block_weights(plan: RunPlan, block: int) -> int:
    return sum(linear.bits.num_weights for linear in plan.of_block(block))
