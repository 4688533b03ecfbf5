"""The trellis: exact paths, rings that close, kernel and twin alike, tables that reach what they should."""

import itertools

import pytest
import torch

from vptq.config import LinearConfig
from vptq.pipeline.codebooks import SHIPPED, load_file, shipped_error
from vptq.quantize.columns import ColumnQuantizer, TrellisQuantizer, VectorQuantizer
from vptq.quantize.gaussian import gaussian_codebook, gaussian_trellis, mean_squared_error
from vptq.quantize.trellis import Trellis, encode_again, encode_sequences, new_bits, plain_viterbi, viterbi
from vptq.recipe import LADDER

COLUMNS = 6
CASES = [(4, 2, 1), (6, 2, 1), (5, 3, 2), (7, 5, 1), (4, 4, 2)]


def states_of(stored, trellis):
    """States (n, steps) int32 of rings whose vectors add these bits (n, steps)."""
    bits = [(stored >> i) & 1 for i in range(trellis.step_bits)]
    stream = torch.stack(bits, -1).flatten(1)
    ends = (torch.arange(stored.shape[1]) + 1) * trellis.step_bits
    places = (ends[:, None] - trellis.state_bits + torch.arange(trellis.state_bits)) % stream.shape[1]
    return (stream[:, places] << torch.arange(trellis.state_bits)).sum(-1).int()


def cost(sequences, states, table):
    return (table[states.long()] - sequences).square().sum((1, 2))


@pytest.mark.parametrize("state_bits, step_bits, vector_len", CASES)
def test_viterbi_finds_the_best_of_all_paths(state_bits, step_bits, vector_len, generator):
    trellis, steps = Trellis(state_bits, step_bits), 3
    table = torch.randn(1 << state_bits, vector_len, generator=generator)
    sequence = torch.randn(1, steps, vector_len, generator=generator)
    found = plain_viterbi(sequence, None, table, trellis, None)
    overlap = (1 << trellis.overlap_bits) - 1
    best = min(
        cost(sequence, torch.tensor([path]), table).item()
        for path in itertools.product(range(1 << state_bits), repeat=steps)
        if all(b & overlap == a >> step_bits for a, b in itertools.pairwise(path))
    ) if state_bits * steps <= 18 else None  # fmt: skip
    for a, b in itertools.pairwise(found[0].tolist()):
        assert b & overlap == a >> step_bits
    if best is not None:
        assert cost(sequence, found, table).item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("state_bits, step_bits, vector_len", CASES)
@pytest.mark.parametrize("steps", [2, 7, 32])
def test_rings_close_and_are_given_by_their_new_bits(state_bits, step_bits, vector_len, steps, generator):
    trellis = Trellis(state_bits, step_bits)
    table = torch.randn(1 << state_bits, vector_len, generator=generator)
    states = encode_sequences(torch.randn(9, steps, vector_len, generator=generator), None, table, trellis)
    stored = new_bits(states, trellis)
    assert int(stored.max()) < 1 << step_bits
    assert torch.equal(states_of(stored, trellis), states)


def test_ring_is_nearly_the_best_of_all_seams(generator):
    trellis = Trellis(7, 2)
    table = torch.randn(128, 1, generator=generator)
    sequences = torch.randn(40, 64, 1, generator=generator)
    seams = range(1 << trellis.overlap_bits)
    every = [cost(sequences, viterbi(sequences, None, table, trellis, torch.full((40,), seam)), table) for seam in seams]
    found = cost(sequences, encode_sequences(sequences, None, table, trellis), table)
    assert (found / torch.stack(every).amin(0)).mean() < 1.01


def test_encoding_again_is_never_worse(generator):
    trellis = Trellis(6, 2)
    table = torch.randn(64, 1, generator=generator)
    first = encode_sequences(torch.randn(30, 32, 1, generator=generator), None, table, trellis)
    sequences = torch.randn(30, 32, 1, generator=generator)
    again = encode_again(sequences, None, table, trellis, first)
    assert (cost(sequences, again, table) <= cost(sequences, first, table) * (1 + 1e-6)).all()
    assert torch.equal(states_of(new_bits(again, trellis), trellis), again)


def test_vectors_without_weight_have_no_say(generator):
    trellis, table = Trellis(6, 2), torch.randn(64, 1, generator=generator)
    sequences = torch.randn(5, 32, 1, generator=generator)
    weights = torch.ones(32)
    weights[20:] = 0
    other = sequences.clone()
    other[:, 20:] = 99
    found = [encode_sequences(x, weights, table, trellis) for x in (sequences, other)]
    assert torch.equal(*found)


@pytest.mark.parametrize("state_bits, step_bits, vector_len", [*CASES, (9, 2, 1), (8, 7, 1)])
@pytest.mark.parametrize("weighted", ["no", "steps", "all"])
@pytest.mark.ci
def test_kernel_equals_plain(kernel_device, state_bits, step_bits, vector_len, weighted, generator):
    trellis = Trellis(state_bits, step_bits)
    table = torch.randn(1 << state_bits, vector_len, generator=generator).to(kernel_device)
    sequences = torch.randn(4, 19, vector_len, generator=generator).to(kernel_device)
    weights = {"no": None, "steps": torch.rand(19), "all": torch.rand(4, 19)}[weighted]
    weights = None if weights is None else weights.to(kernel_device)
    for seam in (None, torch.tensor([0, 1, 0, 1], device=kernel_device) % (1 << trellis.overlap_bits)):
        found = viterbi(sequences, weights, table, trellis, seam)
        expected = plain_viterbi(sequences, weights, table, trellis, seam)
        weight = 1 if weights is None else weights.expand(4, 19)[:, :, None]
        errors = [((table[s.long()] - sequences).square() * weight).sum((1, 2)) for s in (found, expected)]
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-4)  # ties may fall otherwise
        if seam is not None:
            assert torch.equal(found[:, 0] & ((1 << trellis.overlap_bits) - 1), seam.int())


def test_trained_table_beats_what_it_starts_from_and_scalar_quantization(monkeypatch):
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_SEQUENCES", 256)
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_ITERATIONS", 12)
    monkeypatch.setattr("vptq.quantize.gaussian.TEST_NUMBERS", 1 << 16)
    config = LinearConfig(vector_lens=(-1, 1), num_centroids=(-1, 64), trellis_bits=2, codebook_scope="shared")
    trained = mean_squared_error(config, gaussian_trellis(1, Trellis(6, 2), torch.device("cpu")))
    assert trained < 0.092  # Lloyd-Max at 2 bits: 0.1175
    assert trained > 2**-4  # nothing beats the rate-distortion bound


def test_same_table_every_time(monkeypatch):
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_SEQUENCES", 64)
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_ITERATIONS", 3)
    first, second = (gaussian_trellis(1, Trellis(5, 2), torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second)


def test_gaussian_codebook_reaches_known_error():
    """Lloyd-Max: 4 levels leave 0.1175 of a unit Gaussian."""
    config = LinearConfig(vector_lens=(-1, 1), num_centroids=(-1, 4), codebook_scope="shared")
    assert mean_squared_error(config, gaussian_codebook(1, 4, torch.device("cpu"))) == pytest.approx(0.1175, abs=0.001)


@pytest.mark.parametrize("vector_len, step_bits", LADDER)
def test_shipped_tables_are_what_their_figures_say(vector_len, step_bits):
    config = LinearConfig(
        vector_lens=(-1, vector_len), num_centroids=(-1, 4096), trellis_bits=step_bits, codebook_scope="shared"
    )
    error = shipped_error(config)
    bound = 4 ** -(step_bits / vector_len)
    assert bound < error < 2.4 * bound
    table = load_file(SHIPPED)[f"gaussian1-v{vector_len}-k4096-b{step_bits}.main"].float()
    generator = torch.Generator().manual_seed(7)
    columns = torch.randn(8, 256, generator=generator)
    quantizer = TrellisQuantizer(table, Trellis(12, step_bits), 256, 256 // vector_len)
    found = (columns - quantizer.decode(quantizer.encode(columns))).square().mean().item()
    assert found == pytest.approx(error, rel=0.15)


def test_padded_rings(generator):
    """A column that does not fill its rings: what fills them up changes nothing and is cut off."""
    table = torch.randn(64, 1, generator=generator)
    quantizer = TrellisQuantizer(table, Trellis(6, 2), 48, 32)
    columns = torch.randn(3, 48, generator=generator)
    codes = quantizer.encode(columns)
    assert codes.shape == (3, 64, 1) and quantizer.decode(codes).shape == (3, 48)
    again = quantizer.encode_again(columns, codes)
    before, after = ((columns - quantizer.decode(c)).square().sum(1) for c in (codes, again))
    assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("beam", [1, 4, 16])
def test_beam_is_never_worse_and_a_full_one_is_exact(beam, generator):
    main, residual = torch.randn(16, 2, generator=generator), 0.3 * torch.randn(8, 2, generator=generator)
    columns = torch.randn(2, 21, generator=generator)  # the last vector is padded
    greedy = VectorQuantizer((main, residual), 21)
    wide = VectorQuantizer((main, residual), 21, beam)
    codes = greedy.encode(columns)
    again = wide.encode_again(columns, codes)
    errors = [(columns - greedy.decode(c)).square() for c in (codes, again)]
    assert (errors[1].sum(1) <= errors[0].sum(1) + 1e-6).all()
    if beam == 16:
        pairs = (main[:, None] + residual[None]).view(-1, 2)
        vectors = torch.nn.functional.pad(columns, (0, 1)).view(-1, 2)
        mask = torch.ones(2, 22)
        mask[:, 21] = 0
        best = ((vectors[:, None] - pairs).square() * mask.view(-1, 1, 2)).sum(2).amin(1).sum()
        assert errors[1].sum() == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize(
    "state_bits, step_bits, vector_len, rows, ring_len, factors",
    [
        (6, 2, 1, 64, 32, 1), (6, 2, 1, 64, 32, 2), (6, 1, 1, 32, 32, 1), (7, 3, 2, 120, 32, 2), (6, 5, 2, 64, 32, 1),
        (6, 4, 1, 40, 32, 2), (4, 4, 1, 40, 32, 1), (8, 3, 3, 96, 32, 1),
    ],
)  # fmt: skip
@pytest.mark.ci
def test_kernel_sweeps_as_columns_one_by_one(
    kernel_device, monkeypatch, state_bits, step_bits, vector_len, rows, ring_len, factors, generator
):
    table = torch.randn(1 << state_bits, vector_len, generator=generator).to(kernel_device)
    quantizer = TrellisQuantizer(table, Trellis(state_bits, step_bits), rows, ring_len)
    left = torch.randn(2, COLUMNS, rows, generator=generator).to(kernel_device)
    factors = torch.randn(factors, COLUMNS, COLUMNS, generator=generator).triu() * 0.2
    factors = (factors + torch.eye(COLUMNS)).to(kernel_device)
    if len(factors) == 1:
        factors = factors.mT.contiguous().mT  # as a factor comes that was found transposed
    whole = torch.cat([torch.zeros_like(left[:, :3]), left, torch.zeros_like(left[:, :2])], 1)  # a block inside a matrix
    fast = quantizer.sweep(whole[:, 3 : 3 + COLUMNS], factors)
    plain = left.clone()
    monkeypatch.setattr("vptq.quantize.trellis.use_kernels", lambda device: False)
    slow = ColumnQuantizer.sweep(quantizer, plain, factors)
    vectors = rows // vector_len
    assert torch.equal(fast.codes[:, :, :vectors], slow.codes[:, :, :vectors])
    torch.testing.assert_close(fast.quantized, slow.quantized)
    torch.testing.assert_close(fast.errors, slow.errors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[:, 3 : 3 + COLUMNS], plain, rtol=1e-4, atol=1e-4)
    assert not whole[:, :3].any() and not whole[:, 3 + COLUMNS :].any()
