"""Noise sources: standard normal, independent wherever two draws differ, and the same in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from score_sde.noise import BatchNoise, SampleNoise

F64 = torch.float64


def sample_noise(seeds, shape, step=1, draw=0, dtype=torch.float32):
    return SampleNoise(seeds).open((len(list(seeds)), *shape), dtype, "cpu")(step, draw)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 5, 5), (1, 8, 8), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_a_samples_noise_is_bitwise_the_same_in_any_batch(shape, dtype):
    """Whole, alone, split at every place, in another order and beside strangers."""
    whole = sample_noise(range(33), shape, dtype=dtype)
    assert whole.shape == (33, *shape)
    assert whole.dtype == dtype
    for i in (0, 1, 7, 32):
        assert torch.equal(sample_noise([i], shape, dtype=dtype)[0], whole[i])
    for cut in range(1, 33):
        parts = [sample_noise(range(cut), shape, dtype=dtype), sample_noise(range(cut, 33), shape, dtype=dtype)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_noise(order.tolist(), shape, dtype=dtype), whole[order])
    assert torch.equal(sample_noise([10**12, 4, -3], shape, dtype=dtype)[1], whole[4])


def test_large_batches_are_split_over_threads_without_a_trace():
    whole = sample_noise(range(4000), (64,))
    try:
        torch.set_num_threads(2)
        assert torch.equal(sample_noise(range(4000), (64,)), whole)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(sample_noise(range(3111, 3200), (64,)), whole[3111:3200])


def test_streams_are_functions_of_step_and_draw_in_any_order():
    stream = SampleNoise(range(4)).open((4, 3), F64, "cpu")
    first = stream(5, 2)
    stream(1, 0)
    assert torch.equal(stream(5, 2), first)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sample_noise_is_standard_normal(dtype):
    """Kolmogorov-Smirnov on 200,000 numbers and four moments; false alarm below 1e-5 each."""
    z = sample_noise(range(1000), (200,), dtype=dtype).double().flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-5
    n = len(z)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4.5 * math.sqrt(spread / n)
    assert stats.kstest(z[::2] ** 2, "chi2", args=(1,)).pvalue > 1e-5
    assert abs(z).max() > 4.0


def test_the_tails_are_there():
    """2 million numbers: counts beyond 3, 4 and 4.5 within 5 standard deviations of their expectation."""
    z = sample_noise(range(2000), (1000,)).flatten()
    for bound in (3.0, 4.0, 4.5):
        expected = 2e6 * 2 * float(stats.norm.sf(bound))
        assert abs(int((z.abs() > bound).sum()) - expected) < 5 * math.sqrt(expected)
    assert z.isfinite().all()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Scaled to be standard normal for independent draws."""
    return float((a.double() * b.double()).mean()) * math.sqrt(a.numel())


def test_seeds_steps_draws_and_elements_are_independent():
    """Products of values and of squares of 100,000 pairs that differ in one coordinate of the key; bound 4.5."""
    shape, seeds = (100,), range(1000)
    base = sample_noise(seeds, shape)
    others = {
        "next seed": sample_noise(range(1, 1001), shape),
        "seed far away": sample_noise(range(2**40, 2**40 + 1000), shape),
        "negative seed": sample_noise([-1 - s for s in seeds], shape),
        "next step": sample_noise(seeds, shape, step=2),
        "later step": sample_noise(seeds, shape, step=1025),
        "next draw": sample_noise(seeds, shape, draw=1),
        "next seed and step": sample_noise(range(1, 1001), shape, step=2),
        "next element": base.roll(1, 1),
        "other half of a pair": base.roll(50, 1),
    }
    for name, other in others.items():
        assert abs(correlation(base, other)) < 4.5, name
        assert abs(correlation(base**2 - 1, other**2 - 1)) / 2 < 4.5, name


def test_no_two_keys_share_a_number():
    """The 64-bit words behind 120,000 numbers of nearby keys are distinct, so that the numbers are."""
    many = torch.cat([sample_noise(range(20), (50,), step, draw, F64) for step in range(1, 41) for draw in range(3)])
    assert len(many.flatten().unique()) == many.numel()


def test_sample_noise_does_not_depend_on_the_default_dtype():
    before = sample_noise(range(3), (5,), dtype=F64)
    torch.set_default_dtype(F64)
    try:
        assert torch.equal(sample_noise(range(3), (5,), dtype=F64), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_noise_has_float64_digits():
    z = sample_noise(range(100), (100,), dtype=F64)
    assert (z != z.float().double()).float().mean() > 0.99
    torch.testing.assert_close(sample_noise(range(100), (100,)).double(), z, rtol=0, atol=2e-3)


def test_batch_noise_is_reproducible_and_opened_anew():
    source = BatchNoise(7)
    first, again = (source.open((4, 3), torch.float32, "cpu") for _ in range(2))
    assert torch.equal(first(1, 0), again(1, 0))
    assert not torch.equal(first(2, 0), BatchNoise(7).open((4, 3), torch.float32, "cpu")(1, 0))
    assert not torch.equal(BatchNoise(8).open((4,), F64, "cpu")(1, 0), BatchNoise(7).open((4,), F64, "cpu")(1, 0))


def test_batch_noise_without_a_seed_keeps_the_one_it_took():
    source, other = BatchNoise(), BatchNoise()
    assert source.seed != other.seed
    assert torch.equal(
        source.open((4,), torch.float32, "cpu")(1, 0), BatchNoise(source.seed).open((4,), torch.float32, "cpu")(1, 0)
    )


@pytest.mark.parametrize("source", [BatchNoise(1), BatchNoise(), SampleNoise(range(4))])
def test_torchs_global_generator_is_left_alone(source):
    state = torch.get_rng_state()
    source.open((4, 3), torch.float32, "cpu")(1, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: SampleNoise(range(3)).open((4, 2), torch.float32, "cpu"), "3 seeds for a batch of 4"),
        (lambda: SampleNoise(torch.zeros(2, 2, dtype=torch.long)), "one integer per sample"),
        (lambda: SampleNoise([0.5, 1.5]), "one integer per sample"),
    ],
)
def test_wrong_seeds_are_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_the_noise_of_a_run_is_keyed_by_seed_and_sample_for_any_seed():
    assert torch.equal(SampleNoise.of_run(7, [0, 3]).seeds, torch.tensor([7 << 32, (7 << 32) + 3]))
    seeds = [0, 1, -1, 2**31 - 1, 2**31, 3_000_000_000]
    keys = torch.cat([SampleNoise.of_run(seed, range(3)).seeds for seed in seeds])
    assert len(keys.unique()) == 3 * len(seeds)


@pytest.mark.parametrize("make", [BatchNoise, lambda seed: SampleNoise.of_run(seed, range(2))])
def test_a_seed_is_a_whole_number(make):
    with pytest.raises(ValueError, match=r"a whole number seed, got seed=0\.5"):
        make(0.5)


def test_seeds_that_are_no_seeds_are_refused_with_the_fix():
    with pytest.raises(TypeError, match=r"a seed for each sample, got 4: give range\(4\)"):
        SampleNoise(4)
    with pytest.raises(ValueError, match="beyond the 64 bits"):
        BatchNoise(2**70)
