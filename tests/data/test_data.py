"""Batches are functions of (seed, step); an epoch shows each example once; scales, splits and refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from score_sde import targets
from score_sde.data import (
    Batch,
    Data,
    Draws,
    Examples,
    TargetStream,
    TensorData,
    digits,
    image_folder,
    load_file,
    measure_data_std,
    measure_sigma_data,
    measure_sigma_max,
)
from score_sde.keyed import generator, key


def numbered(count: int, **options) -> TensorData:
    return TensorData(torch.arange(count, dtype=torch.float32)[:, None], **options)


def ready(data: Data, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
    """Rows of the batch of a step as a process of a trainer prepares them."""
    return data.prepare(data.batch(step, batch_size, rows), Draws(generator(7, "prepare", step), batch_size, rows))


def test_keys_differ_in_every_word_and_stay_what_they_are():
    keys = {key(*words) for words in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a"), (10, "a")]}
    assert len(keys) == 6
    assert key(0, "step", 17) == 7632570683417508863
    first, second = (torch.rand(3, generator=generator(5, "x", 2)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (7, 7), (6, 17), (8, 1)])
def test_each_epoch_shows_each_example_once_across_batches(count, batch_size):
    data = numbered(count, seed=3)
    steps = -(-4 * count // batch_size)
    seen = torch.cat([data.batch(step, batch_size).x[:, 0] for step in range(steps)])[: 4 * count].long().view(4, count)
    assert (seen.sort(dim=1).values == torch.arange(count)).all()
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: numbered(20, seed=seed),
        lambda seed: TargetStream(targets.make("ring"), seed=seed),
        lambda seed: digits(seed=seed, dequantize=True, labels=True),
    ],
)
def test_batches_depend_on_seed_and_step_alone(make):
    data, again = make(0), make(0)
    forward = [ready(data, step, 6).x for step in range(8)]
    backward = [ready(again, step, 6).x for step in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], ready(make(1), 0, 6).x)
    assert not torch.equal(forward[0], forward[1])
    assert forward[0].dtype == torch.float32


SPLITS = [[slice(0, 6)], [slice(0, 3), slice(3, 6)], [slice(0, 1), slice(1, 2), slice(2, 6)], [slice(0, 6, 2)]]


@pytest.mark.parametrize("slices", SPLITS)
@pytest.mark.parametrize(
    "make", [lambda: digits(dequantize=True, labels=True), lambda: TargetStream(targets.make("ring"))]
)
def test_processes_that_share_a_batch_read_and_prepare_its_rows_bit_for_bit(make, slices):
    data = make()
    for step in (0, 239):  # the second spans two epochs of the 1,438 digits
        whole = ready(data, step, 6)
        for rows in slices:
            part = ready(data, step, 6, rows)
            assert torch.equal(part.x, whole.x[rows])
            assert all(torch.equal(part.condition[name], whole.condition[name][rows]) for name in whole.condition)


def test_batches_of_integers_are_read_as_they_are_stored():
    assert digits().batch(0, 4).x.dtype == torch.uint8


def test_stream_follows_its_target_and_references_are_fresh():
    target = targets.GaussianMixture(torch.ones(1), torch.tensor([[3.0, -1.0]]), torch.eye(2)[None] * 0.25)
    data = TargetStream(target)
    assert data.event_shape == (2,)
    assert data.target is target
    assert data.size is None
    x, reference = data.batch(0, 4000).x, data.reference(4000).x
    for draws in (x, reference):  # five standard errors: 0.5 / sqrt(4000) = 0.0079
        torch.testing.assert_close(draws.mean(0), torch.tensor([3.0, -1.0]), rtol=0, atol=0.04)
    assert torch.equal(reference, data.reference(4000).x)
    assert not set(map(tuple, reference.tolist())) & set(map(tuple, x.tolist()))


def test_a_share_held_out_that_is_no_example_is_warned_of():
    with pytest.warns(UserWarning, match=r"held_out=0.1 of 9 examples rounds down to none: samples will be compared"):
        data = TensorData(torch.zeros(9, 2), held_out=0.1)
    assert not data.has_test


@pytest.mark.parametrize("options", [{"held_out": 0.3}, {}, {"test": Examples(torch.arange(100.0, 107.0)[:, None])}])
def test_places_are_the_rows_of_the_array_that_was_given(options):
    data = numbered(20, **options)
    test = options["test"].x if options.get("test") else torch.arange(20.0)[:, None]
    assert torch.equal(data.reference(5).x, test[data.places("test")[:5]])
    assert torch.equal(data.plain("test").x, test[data.places("test")])
    assert torch.equal(data.examples().x[:, 0], data.places("train").float())


def test_a_tenth_is_held_out_unless_there_is_a_test_set():
    data, test = numbered(50, held_out=None), Examples(torch.zeros(3, 1))
    assert (data.size, data.count("test")) == (45, 5)
    data = numbered(50, held_out=None, test=test)
    assert (data.size, data.count("test")) == (50, 3)
    with pytest.raises(ValueError, match=r"held_out=0\.1 beside a test set"):
        numbered(50, held_out=0.1, test=test)


def test_held_out_examples_are_fixed_and_disjoint_from_training():
    data = numbered(50, held_out=0.2, seed=0)
    held = set(data.reference(100).x[:, 0].tolist())
    trained = set(data.examples().x[:, 0].tolist())
    assert len(held) == 10
    assert held | trained == set(range(50))
    assert not held & trained
    assert set(data.batch(0, 40).x[:, 0].tolist()) == trained
    assert held == set(numbered(50, held_out=0.2, seed=9).reference(10).x[:, 0].tolist())


def test_labels_follow_their_examples():
    data = TensorData(torch.arange(30.0)[:, None], torch.arange(30) % 3, held_out=0.3)
    assert data.num_classes == 3
    for batch in (data.batch(4, 8), data.reference(9), data.examples()):
        assert (batch.condition["label"] == batch.x[:, 0].long() % 3).all()


def test_some_classes_are_the_examples_of_these_and_know_the_whole():
    data = TensorData(torch.arange(40.0)[:, None], torch.arange(40) % 4, held_out=0.4)
    whole, part = data.fingerprint, data.of_classes([3, 1, 3])
    for name in ("train", "test"):
        rows = data.plain(name)
        kept = rows.x[(rows.condition["label"] % 2).bool()]
        assert torch.equal(part.plain(name).x, kept)  # in the same order
    assert part.size == part.count("train") < data.size == 24
    assert sorted(part.batch(0, part.size).x.flatten().tolist()) == sorted(part.examples().x.flatten().tolist())
    assert part.whole is part.of_classes([1]).whole is data.whole is data
    assert len({whole, part.fingerprint, *(part.of_classes([c]).fingerprint for c in (1, 3))}) == 4
    assert data.of_classes(range(4)).plain("train").x.equal(data.plain("train").x)
    for build, message in ((lambda: data.of_classes([4]), "no train example has label 4"),
                           (lambda: part.of_classes([0]), "has label 0"),
                           (lambda: numbered(4).of_classes([0]), "have no labels")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build()


def test_integers_are_scaled_to_plus_minus_one():
    x = torch.arange(256, dtype=torch.uint8)[:, None]
    flat = TensorData(x, dequantize=False).examples().x[:, 0].sort().values
    assert flat[0] == -1
    assert flat[-1] == 1
    torch.testing.assert_close(flat.diff(), torch.full((255,), 2 / 255))
    noisy = TensorData(x, dequantize=True)
    first, second = (ready(noisy, step, 256).x[:, 0].sort().values for step in (0, 1))
    assert torch.equal(((first + 1) * 128).floor(), torch.arange(256.0))
    assert not torch.equal(first, second)


def test_dequantised_digits_fill_their_cells_uniformly():
    x = digits(dequantize=True).examples().x
    fraction = (x.double() + 1) * 8.5 % 1
    assert x.min() >= -1
    assert x.max() <= 1
    # 92,032 uniform fractions: standard errors 0.00095 and 0.0003, five of each allowed.
    assert abs(fraction.mean() - 0.5) < 0.005
    assert abs(fraction.var() - 1 / 12) < 0.0015


def test_digits_are_the_real_ones():
    data = digits(labels=True)
    assert data.event_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert (data.size, len(data.reference(10_000).x)) == (1438, 359)
    assert set(data.reference(359).condition["label"].tolist()) == set(range(10))
    assert digits().num_classes is None
    assert not digits().batch(0, 4).condition


def test_sixteen_bits_are_integers_like_eight():
    codes = np.array([[0, 1], [700, 65535]], np.uint16)
    with pytest.raises(ValueError, match=r"integers 0\.\.65535, levels=256 allows 0\.\.255"):
        TensorData(codes, dequantize=False)
    plain = TensorData(codes, dequantize=False, levels=2**16)
    assert torch.allclose(plain.plain("train").x.sort(0).values, torch.tensor(codes / 65535 * 2 - 1).float(), atol=1e-7)
    spread = TensorData(codes, dequantize=True, levels=2**16)
    noisy = spread.prepare(spread.batch(0, 2), Draws(generator(0), 2)).x.sort(0).values
    assert ((noisy + 1) * 2**15 - torch.tensor(codes.astype(float))).sub(0.5).abs().max() <= 0.51


def test_an_augmentation_is_an_object():
    with pytest.raises(TypeError, match=r"augment is an augmentation, e\.g\. Augment\(0\.12\), got True"):
        TensorData(torch.zeros(4, 3, 8, 8), augment=True)


def test_data_say_what_they_hold():
    assert repr(TensorData(torch.zeros(10, 3, 4, 4), held_out=0.2)) == "TensorData(event_shape=(3, 4, 4), size=8)"
    labelled = TensorData(torch.zeros(3, 2), torch.tensor([0, 2, 1]))
    assert repr(labelled) == "TensorData(event_shape=(2,), size=3, classes=3)"
    assert repr(TargetStream(targets.make("two_moons"))).startswith(
        "TargetStream(event_shape=(2,), target=Empirical(512 points"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TensorData(torch.zeros(4, 2, dtype=torch.uint8)), "uint8, which has no density: say dequantize=True"),
        (lambda: TensorData(torch.zeros(4, 2), dequantize=True), "is for integers"),
        (lambda: TensorData(torch.full((4, 2), 17), dequantize=False, levels=17), r"levels=17 allows 0\.\.16"),
        (
            lambda: TensorData(torch.tensor([[1.0], [float("nan")], [float("inf")]])),
            "x has values that are not finite in float32, in 2 of 3 rows, the first is row 1",
        ),
        (
            lambda: TensorData(torch.tensor([[1.0], [1e39]], dtype=torch.float64)),
            "not finite in float32, in 1 of 2 rows",
        ),
        (
            lambda: TensorData(torch.zeros(4, 2, dtype=torch.complex64), dequantize=False),
            "complex64: give real numbers",
        ),
        (lambda: TensorData(torch.zeros(4, 2), torch.tensor([0, -1, 2, 1])), r"shape \(4,\), the least -1"),
        (lambda: TensorData(torch.zeros(0, 2)), "at least one example"),
        (lambda: TensorData(torch.zeros(4)), r"give \(N, \*event\) .* of numbers, x\[:, None\]"),
        (lambda: TensorData(torch.zeros(4, 2), torch.zeros(4)), "labels must be 4 integers"),
        (lambda: TensorData(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long)), "labels must be 4 integers"),
        (
            lambda: TensorData(torch.zeros(2, 2), ["cat", "dog"]),
            r"labels is .*np\.unique\(labels, return_inverse=True\)\[1\]",
        ),
        (lambda: TensorData(torch.zeros(4, 2), held_out=1.0), "held_out=1.0"),
        (
            lambda: TensorData(pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})),
            "x is an array of dtype object, as a column of text",
        ),
    ],
)
def test_unusable_data_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.filterwarnings("error")
def test_whatever_numpy_takes_for_an_array_is_one():
    x, labels, context = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 1, 0]), np.linspace(0, 1, 8)
    same = TensorData(torch.from_numpy(x), torch.from_numpy(labels), context=torch.from_numpy(context).view(4, 2))
    for given in (x, pd.DataFrame(x), x.tolist()):
        held = Examples(given, pd.Series(labels), context=context.reshape(4, 2))
        data = TensorData(given, pd.Series(labels), context=context.reshape(4, 2).tolist(), test=held)
        assert data._parts["train"].given.x.dtype == torch.float32
        for found, wanted in ((data.batch(0, 4), same.batch(0, 4)), (data.reference(4), same.reference(4))):
            assert torch.equal(found.x, wanted.x)
            assert torch.equal(found.condition["label"], wanted.condition["label"])
            assert torch.equal(found.condition["context"], wanted.condition["context"])


def test_each_example_keeps_its_context(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3))
    arrays = {"x": x, "tokens": np.stack([x, -x], axis=1), "held": x[:2], "held_tokens": np.zeros((2, 1, 3))}
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_file(tmp_path / "a.npz", context="tokens", test="held", test_context="held_tokens")
    batch = ready(data, 0, 4)
    assert torch.equal(batch.condition["context"], torch.stack([batch.x, -batch.x], dim=1))
    assert data.reference(2).condition["context"].shape == (2, 1, 3)
    without = load_file(tmp_path / "a.npz")
    assert without.batch(0, 4).condition == {}
    assert without.fingerprint != load_file(tmp_path / "a.npz", context="tokens").fingerprint
    with pytest.raises(ValueError, match="and so with context"):
        load_file(tmp_path / "a.npz", context="tokens", test="held")
    assert load_file(tmp_path / "a.npz", context="x").batch(0, 4).condition["context"].shape == (4, 3)
    with pytest.raises(
        ValueError, match=r"context must be floats \(6, width\) or .*; got torch.float64 of shape \(2, 3\)"
    ):
        load_file(tmp_path / "a.npz", context="held")


def test_files_give_their_arrays(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 2, 0, 1, 2])
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x, y=y)
    for data in (load_file(tmp_path / "a.npy"), load_file(tmp_path / "b.npz", labels="y")):
        np.testing.assert_allclose(data.examples().x.sort(0).values, np.sort(x, 0), rtol=1e-6)
    assert load_file(tmp_path / "b.npz", labels="y").num_classes == 3
    with pytest.raises(ValueError, match="has no array images, only x, y"):
        load_file(tmp_path / "b.npz", x="images")
    with pytest.raises(ValueError, match=r"not a \.npy or \.npz"):
        load_file(tmp_path / "c.csv")


def test_a_pickled_array_is_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds no array of numbers"):
        load_file(tmp_path / "a.npy")


def test_image_folder_crops_resizes_and_numbers_its_folders(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture = Image.new("RGB", (40, 20), (0, 255, 0))
            picture.paste(colour, (10, 0, 30, 20))
            picture.save(tmp_path / name / f"{i}.png")
    data = image_folder(tmp_path, 8, labels=True)
    batch = data.examples()
    assert data.event_shape == (3, 8, 8)
    assert data.num_classes == 2
    red = batch.condition["label"] == 0
    assert torch.equal(batch.x[red].amin((0, 2, 3)), torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(batch.x[~red].amax((0, 2, 3)), torch.tensor([-1.0, -1.0, 1.0]))
    assert image_folder(tmp_path, 8, channels=1).event_shape == (1, 8, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        image_folder(tmp_path / "empty", 8)


def test_measured_scales_against_direct_computation():
    x = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    data = TensorData(x)
    flat = x.flatten(1).numpy().astype(np.float64)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)[np.triu_indices(60, 1)]
    assert measure_sigma_max(data) == pytest.approx(distances.max(), rel=1e-5)
    assert measure_sigma_max(data, quantile=0.5) == pytest.approx(np.median(distances), rel=1e-2)
    assert measure_sigma_data(data) == pytest.approx(np.sqrt((flat**2).mean()), rel=1e-6)
    assert measure_data_std(data) == pytest.approx(np.sqrt(((flat - flat.mean(0)) ** 2).mean()), rel=1e-6)
    with pytest.raises(ValueError, match=r"quantile=0\.0"):
        measure_sigma_max(data, quantile=0.0)
    with pytest.raises(ValueError, match="do not vary"):
        measure_sigma_max(TensorData(torch.ones(5, 2)))


class Pairs(torch.utils.data.Dataset):
    """As most are written: nothing says where the items end but the length."""

    def __init__(self, parts: int = 2) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        item = (torch.full((1, 2, 2), float(index)), index % 3, "more")[: self.parts]
        return item if self.parts > 1 else item[0]


def test_a_torch_dataset_is_read_through_with_its_labels():
    batch = TensorData(Pairs()).examples()
    assert sorted(batch.x[:, 0, 0, 0].tolist()) == list(range(6))
    assert torch.equal(batch.condition["label"], batch.x[:, 0, 0, 0].long() % 3)
    assert TensorData(Pairs(1)).examples().condition == {}
    alone = TensorData(torch.utils.data.TensorDataset(torch.eye(3))).examples()
    assert (alone.x.sum(), alone.condition) == (3, {})
    assert TensorData(Pairs(), torch.zeros(6, dtype=int)).num_classes == 1
    for test in (Pairs(), (torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=int))):
        assert TensorData(Pairs(), test=test).reference(9).condition["label"].shape == (6,)
    assert len(TensorData(torch.eye(3), test=np.eye(3)).reference(9).x) == 3
    with pytest.raises(ValueError, match=r"items of 3 parts"):
        TensorData(Pairs(3))
    with pytest.raises(ValueError, match="no length"):
        TensorData(torch.utils.data.Dataset())
