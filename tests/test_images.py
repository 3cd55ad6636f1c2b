"""Image tasks: class episodes, readers of the true on-disk formats, glyphs."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import metaopt as mo
from metaopt.tasks import Episodes, LabelledImages, glyphs, label_noise, split_classes, split_families
from metaopt.tasks import fonts as font_files

SEEDS = st.integers(-10_000, 10_000)


def numbered(per_class=12, classes=6, size=5):
    """Images whose first pixel values tell the row: (row, class, 255, …), so that every draw can be traced."""
    rows = torch.arange(per_class * classes)
    images = torch.full((len(rows), 2, size, size), 255, dtype=torch.uint8)
    images[:, 0] = rows.view(-1, 1, 1)
    images[:, 1] = (rows % classes).view(-1, 1, 1)
    return LabelledImages(images, rows % classes, tuple("abcdefgh"[:classes]))


DATA = numbered()
PLAIN = Episodes(DATA, ways=3, shots=4, test_shots=2, batch_size=5, crop=0, flip=False, dtype=torch.float64)


def row(x):
    """The row number that an unaugmented image carries."""
    return ((x[..., 0, 0, 0] + 1) * 127.5).round().long()


@given(seed=SEEDS)
def test_an_episode_is_made_of_its_classes_and_keeps_test_images_apart(seed):
    before = torch.get_rng_state()
    episode = PLAIN.sample(3, seed)
    for task in range(episode.tasks):
        train = row(episode.train.x[task])
        test = row(episode.test.x[task])
        assert len({*train.tolist(), *test.tolist()}) == 3 * (4 + 2)
        for rows, y in ((train, episode.train.y[task]), (test, episode.test.y[task])):
            assert torch.equal(DATA.labels[rows], episode.classes[task][y])
        assert torch.equal(episode.train.y[task].bincount(), torch.tensor([4, 4, 4]))
    assert not torch.equal(episode.train_rows[0], episode.train_rows[1])
    assert torch.equal(before, torch.get_rng_state())


@given(seed=SEEDS, t=st.integers(1, 50))
def test_batches_depend_on_seed_and_step_alone(seed, t):
    setting = Episodes(DATA, ways=3, shots=4, test_shots=2, batch_size=5, crop=1, flip=True)
    a = setting.sample(2, seed)
    b = setting.sample(2, seed)
    other = a.batches(t + 1)
    torch.manual_seed(3)
    for ours, theirs in ((a.batches(t), b.batches(t)), (a.outer_batches(t), b.outer_batches(t))):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)
    assert not torch.equal(a.batches(t).x, other.x)
    assert not torch.equal(a.batches(t).x, setting.sample(2, seed + 1).batches(t).x)


def test_a_minibatch_is_drawn_without_replacement_with_its_labels():
    episode = PLAIN.sample(2, 0)
    seen = [set(), set()]
    for t in range(1, 40):
        for batch, rows in ((episode.batches(t), episode.train_rows), (episode.outer_batches(t), episode.test_rows)):
            for task in range(2):
                drawn = row(batch.x[task])
                assert len(set(drawn.tolist())) == 5 and set(drawn.tolist()) <= set(rows[task].tolist())
                assert torch.equal(DATA.labels[drawn], episode.classes[task][batch.y[task]])
        seen[0] |= set(row(episode.batches(t).x[0]).tolist())
    assert seen[0] == set(episode.train_rows[0].tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_sees_the_same_batches():
    setting = Episodes(DATA, ways=3, shots=4, test_shots=2, batch_size=5, crop=1, corruption=label_noise.flip)
    cpu = setting.sample(2, 0)
    gpu = replace(setting, device="cuda").sample(2, 0)
    for ours, theirs in (
        (cpu.batches(3), gpu.batches(3)),
        (cpu.outer_batches(3), gpu.outer_batches(3)),
        (cpu.test, gpu.test),
    ):
        assert theirs.x.is_cuda and theirs.y.is_cuda
        assert torch.equal(ours.x, theirs.x.cpu()) and torch.equal(ours.y, theirs.y.cpu())


def test_crops_and_flips_are_pieces_of_the_padded_image():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 4, 6), generator=generator, dtype=torch.uint8)
    data = LabelledImages(image.repeat(40, 1, 1, 1), torch.arange(40) % 2, ("a", "b"))
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    pieces = {}
    for top in range(5):
        for left in range(5):
            for mirrored in (False, True):
                piece = padded[:, top : top + 4, left : left + 6]
                pieces[(piece.flip(-1) if mirrored else piece).numpy().tobytes()] = (top, left, mirrored)
    episode = Episodes(data, ways=2, shots=15, test_shots=5, batch_size=10, crop=2).sample(4, 0)
    seen = []
    for t in range(1, 21):
        x = ((episode.batches(t).x + 1) * 127.5).round().to(torch.uint8)
        seen += [pieces[x[i, j].numpy().tobytes()] for i in range(4) for j in range(10)]
        assert torch.equal(((episode.outer_batches(t).x[0, 0] + 1) * 127.5).round().to(torch.uint8), image[0])
    assert len(set(seen)) == 50 and abs(np.mean([mirrored for *_, mirrored in seen]) - 0.5) < 0.08


@pytest.mark.parametrize(
    ("noise", "wrong"), [(label_noise.uniform, 0.36), (label_noise.flip, 0.4), (label_noise.flip2, 0.4)]
)
def test_noise_reaches_training_labels_only(noise, wrong):
    data = LabelledImages(torch.zeros(5000, 1, 2, 2, dtype=torch.uint8), torch.arange(5000) % 10, tuple("0123456789"))
    setting = Episodes(data, shots=400, test_shots=100, batch_size=1000, crop=0, flip=False, corruption=noise, rate=0.4)
    episode = setting.sample(3, 0)
    changed = episode.train.y != episode.clean_labels
    assert (changed.double().mean(1) - wrong).abs().max() < 0.05  # six standard errors
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(episode.test.y, torch.arange(10).repeat_interleave(100).expand(3, -1))
    assert torch.equal(episode.train.y, setting.sample(3, 0).train.y)
    assert torch.equal(episode.outer_batches(1).y.sort(1).values, episode.test.y)


def test_an_episode_is_a_meta_task():
    model = mo.functional(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 3)).double())
    w, lam = mo.partition(model.params, weights=["*weight"])

    def loss(w, lam, batch):
        return torch.nn.functional.cross_entropy(model(mo.merge(w, lam), batch.x), batch.y)

    meta = mo.meta.MetaTraining(
        mo.inner_step(mo.vmapped(loss), mo.optim.SGD(0.1)), mo.vmapped(loss), mo.OneStep(), horizon=2
    )
    outer = mo.meta.OuterOptimizer(lam, lambda p: torch.optim.SGD(p, 0.1))

    def task(run):
        episode = PLAIN.sample(2, run)
        return mo.meta.MetaTask(episode.batches, episode.outer_batches, episode.tasks)

    *_, report = meta.runs(w, outer, task, count=2)
    assert all(np.isfinite(report.outer_losses))
    assert not torch.equal(report.lam["1.bias"], lam["1.bias"])


@given(seed=st.integers(0, 10_000))
def test_class_splits_share_no_class(seed):
    parts = split_classes(DATA, (3, 1, 2), seed)
    assert sorted(name for part in parts for name in part.names) == list(DATA.names)
    for part in parts:
        assert [part.names[label] for label in part.labels] == [DATA.names[c] for c in part.images[:, 1, 0, 0].tolist()]
        assert torch.equal(part.counts(), torch.full((len(part.names),), 12))
        assert torch.equal(DATA.classes(part.names).images, part.images)


def test_images_of_any_dataset():
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 256, (3, 4), np.uint8)
    colour = generator.integers(0, 256, (3, 4, 3), np.uint8)
    for images, expected in (
        ([grey, Image.fromarray(grey), torch.from_numpy(grey)[None], torch.from_numpy(grey)[None] / 255], grey[None]),
        ([colour, Image.fromarray(colour), torch.from_numpy(colour).movedim(2, 0)], colour.transpose(2, 0, 1)),
    ):
        data = LabelledImages.of([(image, np.int64(i)) for i, image in enumerate(images)])
        assert data.names == tuple(str(i) for i in range(len(images))) and data.images.shape[1:] == expected.shape
        assert all(np.array_equal(image, expected) for image in data.images.numpy())
    assert LabelledImages.of([(Image.fromarray(grey).convert("P"), 0)], names=["x"]).images.shape == (1, 3, 3, 4)


def test_bad_images_are_named():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="list is empty"):
        LabelledImages.of([])
    with pytest.raises(ValueError, match="image 1 is 1×3×2, image 0 is 1×2×2"):
        LabelledImages.of([(image, 0), (torch.zeros(1, 3, 2, dtype=torch.uint8), 0)])
    with pytest.raises(TypeError, match=r"image 1: .*normalisation"):
        LabelledImages.of([(image, 0), (torch.full((1, 2, 2), -1.0), 0)])
    with pytest.raises(TypeError, match="float64"):
        LabelledImages.of([(np.zeros((2, 2)), 0)])
    with pytest.raises(TypeError, match=r"image 0: expected a PIL image.*str"):
        LabelledImages.of([("x", 0)])
    with pytest.raises(TypeError, match="float32"):
        LabelledImages(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), ("a",))
    with pytest.raises(TypeError, match=r"int64 \[1\].*float32"):
        LabelledImages(image[None], torch.zeros(1), ("a",))
    with pytest.raises(ValueError, match="3 … 3, but there are 1"):
        LabelledImages(image[None], torch.tensor([3]), ("a",))
    with pytest.raises(ValueError, match=r"0 … 5, .* got \[1, 1\]"):
        DATA.classes([1, 1])
    with pytest.raises(ValueError, match="no class is called 'z'; there are a, b"):
        DATA.classes(["a", "z"])
    with pytest.raises(ValueError, match=r"at least one; got \[\]"):
        DATA.classes([])
    with pytest.raises(ValueError, match=r"6 classes into parts of \(5, 2\)"):
        split_classes(DATA, (5, 2), 0)


def test_bad_episodes_are_named():
    with pytest.raises(ValueError, match=r"10-way episodes .* has 6"):
        Episodes(DATA)
    with pytest.raises(ValueError, match=r"8 \+ 5 examples .* class 'a' has 12, .*6 of 6"):
        Episodes(DATA, ways=2, shots=8, test_shots=5, batch_size=5)
    with pytest.raises(ValueError, match="batch_size=100 is more than the 2 "):
        Episodes(DATA, ways=2, shots=3, test_shots=1)
    with pytest.raises(ValueError, match="positive"):
        Episodes(DATA, ways=0)
    with pytest.raises(ValueError, match="at least one task"):
        PLAIN.sample(0, 0)


SHIPPED = Path(matplotlib.get_data_path(), "fonts", "ttf")
FILES = [
    SHIPPED / f"{name}.ttf"
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmtt10")
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cache = tmp_path_factory.mktemp("glyphs")

    def make(size=14, characters="AOoХ3ЖΩ", per_class=10, **options):
        return glyphs(size, characters, per_class=per_class, cache=cache, **{"files": FILES, **options})

    make.cache = cache
    return make


@pytest.mark.parametrize("size", [14, 28])
def test_glyphs_are_characters_without_homoglyphs(small, size):
    data = small(size, "AOoОХX3ЖΩ")
    assert data.names == ("A", "O", "Х", "3", "Ж", "Ω")
    assert data.images.shape == (60, 1, size, size) and torch.equal(data.counts(), torch.full((6,), 10))
    assert (data.images.flatten(1).max(1).values > 100).all() and (data.images.float().mean((1, 2, 3)) < 127).all()
    assert data.images[:, :, 0].float().mean() < 0.1 * data.images.float().mean()  # hardly ever over the edge
    assert len({image.numpy().tobytes() for image in data.images}) == 60


def test_glyphs_look_the_same_in_all_fonts_and_differ_between_characters(small):
    data = small(28, "A3ЖΩ", per_class=30)
    x = data.images.float().flatten(1)
    centres = torch.stack([x[data.labels == c].mean(0) for c in range(4)])
    assert (torch.cdist(x, centres).argmin(1) == data.labels).double().mean() > 0.9


def test_no_family_and_no_drawing_is_shared(small):
    names = sorted({font.family for font in font_files.fonts(FILES)})
    assert names == [
        "Computer Modern",
        "Computer Modern Typewriter",
        "DejaVu Sans",
        "DejaVu Sans Mono",
        "DejaVu Serif",
        "STIX",
    ]
    train, test = split_families(names, (3, 3), seed=0)
    assert not set(train) & set(test) and sorted(train + test) == names
    parts = [small(families=chosen, per_class=12) for chosen in (train, test)]
    assert [part.family_names for part in parts] == [train, test]
    assert not {i.numpy().tobytes() for i in parts[0].images} & {i.numpy().tobytes() for i in parts[1].images}
    whole = small(per_class=12)
    assert whole.family_names == tuple(names)
    part = whole.of_families(train)
    assert {part.family_names[i] for i in part.families.unique()} == set(train) and part.names == whole.names
    some = whole.classes([2, 0])
    assert len(some.families) == len(some) == 24
    per_family = torch.bincount(some.classes([1]).families, minlength=6)
    assert per_family.max() - per_family.min() <= 1  # "A" is in all: spread evenly


def test_unjittered_glyphs_are_distinct_drawings(small):
    data = small(characters="AB", per_class=7, jitter=False)
    assert len({image.numpy().tobytes() for image in data.images}) == 14
    with pytest.raises(ValueError, match=r"no character has 8 distinct images in 6 font families"):
        small(characters="AB", per_class=8, jitter=False)


def test_glyphs_are_cached_by_their_setting(small):
    before = set(small.cache.iterdir())
    first = small(seed=5)
    second = small(seed=5)
    (new,) = set(small.cache.iterdir()) - before
    assert torch.equal(first.images, second.images) and torch.equal(first.families, second.families)
    assert not torch.equal(first.images, small(seed=6).images)
    new.unlink()
    assert torch.equal(first.images, small(seed=5).images)
    new.write_bytes(new.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=rf"{new.name} cannot be read.*delete it"):
        small(seed=5)


def test_the_cache_has_its_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    glyphs(14, "AB", per_class=2, files=FILES[:1])
    assert [path.suffix for path in (tmp_path / "metaopt").iterdir()] == [".pt"]


def test_fonts_that_show_something_else_are_passed_over():
    read = {font.path.stem: font for font in font_files.fonts()}
    assert "DejaVuSans" in read and not {
        "LastResortHE-Regular",
        "cmsy10",
        "cmex10",
        "STIXNonUni",
        "STIXSizOneSymReg",
    } & set(read)
    assert ord("A") in read["cmr10"].characters and ord("±") not in read["cmr10"].characters


def test_bad_glyphs_are_named(small, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(ValueError, match="none of 0 fonts has the characters 'A'"):
        small(characters="A", files=[broken])
    with pytest.raises(ValueError, match=r"no such font family: Comic; there are Computer Modern, .*"):
        small(families=["Comic"])
    with pytest.raises(ValueError, match="no such font family: Comic"):
        small().of_families(["Comic"])
    with pytest.raises(ValueError, match="at least 8 pixels"):
        small(size=4)
    with pytest.raises(ValueError, match=r"2 families into parts of \(2, 1\)"):
        split_families(["a", "b"], (2, 1), 0)
