"""Readers, on tiny files in the true on-disk formats."""

import gzip
import hashlib
import importlib
import io
import pickle
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from metaopt import _torchvision
from metaopt.tasks import cifar10, cifar100, fashion_mnist, folder, mnist, tiny_imagenet


class Python2Pickler(pickle._Pickler):
    """Byte strings and booleans as Python 2 wrote them, the way CIFAR was published."""

    def save_string(self, text):
        raw = text.encode() if isinstance(text, str) else text
        self.write((b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(text)

    def save_flag(self, flag):
        self.write(b"K" + bytes([flag]))

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string, bool: save_flag}


def write_pickle(path, content):
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    written = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(written)
    return path.name, hashlib.md5(written).hexdigest()


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 in five files of four images, and CIFAR-100, with torchvision's MD5 sums made to fit."""
    module = _torchvision.datasets()
    for reader, labels, names, key in (
        (module.CIFAR10, "labels", [f"c{i}" for i in range(10)], "label_names"),
        (module.CIFAR100, "fine_labels", [f"f{i}" for i in range(100)], "fine_label_names"),
    ):
        place = tmp_path / reader.base_folder
        place.mkdir()
        for which in ("train_list", "test_list"):
            entries = []
            for i, (name, _) in enumerate(getattr(reader, which)):
                rows = pixels(4, 3 * 32 * 32, seed=i)
                entries.append(
                    list(write_pickle(place / name, {"data": rows, labels: [0, i, 2, 9], "filenames": ["a.png"] * 4}))
                )
            monkeypatch.setattr(reader, which, entries)
        name, md5 = write_pickle(place / reader.meta["filename"], {key: names})
        monkeypatch.setattr(reader, "meta", {"filename": name, "key": key, "md5": md5})
    return tmp_path


def test_cifar(cifar):
    train, test, both = (cifar10(cifar, part) for part in ("train", "test", "all"))
    assert [len(train), len(test), len(both)] == [20, 4, 24] and train.names == tuple(f"c{i}" for i in range(10))
    assert np.array_equal(train.images[8:12].numpy(), pixels(4, 3, 32, 32, seed=2))
    assert train.labels[8:12].tolist() == [0, 2, 2, 9]
    assert torch.equal(both.images[20:], test.images) and torch.equal(both.labels[:20], train.labels)
    fine = cifar100(cifar)
    assert fine.images.shape == (4, 3, 32, 32) and len(fine.names) == 100


def test_damaged_cifar_is_named(cifar):
    damaged = cifar / "cifar-10-batches-py" / "data_batch_3"
    good = hashlib.md5(damaged.read_bytes()).hexdigest()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    bad = hashlib.md5(content[:-1]).hexdigest()
    with pytest.raises(
        ValueError,
        match=rf"{damaged} is damaged: its MD5 is {bad}, not {good}; delete it and unpack \S*cifar-10-python.tar.gz in {cifar}",
    ):
        cifar10(cifar)
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{damaged} is missing; .*download=True"):
        cifar10(cifar, "test")
    (cifar / "cifar-100-python" / "meta").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cifar-100-python.meta is damaged"):
        cifar100(cifar)
    with pytest.raises(ValueError, match="'train', 'test' or 'all', got 'val'"):
        fashion_mnist(cifar, "val")


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError("no network")

    monkeypatch.setattr(_torchvision.datasets().CIFAR10, "download", refuse)
    with pytest.raises(
        RuntimeError, match=rf"download to {tmp_path}/cifar-10-batches-py failed \(no network\).*cifar-10-python.tar.gz"
    ):
        cifar10(tmp_path, download=True)


@pytest.fixture
def fashion(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    return tmp_path


def write_idx(place):
    place.mkdir(parents=True)
    for i, (name, n) in enumerate((("train", 12), ("t10k", 5))):
        (place / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, n, 28, 28) + pixels(n, 28, 28, seed=i).tobytes()
        )
        (place / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + bytes(k % 10 for k in range(n)))


def test_fashion_mnist(fashion):
    train, test, both = (fashion_mnist(fashion, part) for part in ("train", "test", "all"))
    assert np.array_equal(train.images[:, 0].numpy(), pixels(12, 28, 28)) and train.labels.tolist() == [
        *range(10),
        0,
        1,
    ]
    assert np.array_equal(test.images[:, 0].numpy(), pixels(5, 28, 28, seed=1)) and test.names[9] == "Ankle boot"
    assert torch.equal(both.images, torch.cat([train.images, test.images]))


def test_mnist(tmp_path):
    place = tmp_path / "MNIST" / "raw"
    with pytest.raises(
        FileNotFoundError, match=rf"{place}/train-images-idx3-ubyte is missing; unpack the files of .*mnist .* there"
    ):
        mnist(tmp_path)
    write_idx(place)
    digits = mnist(tmp_path, "all")
    assert (
        np.array_equal(digits.images[:12, 0].numpy(), pixels(12, 28, 28))
        and len(digits) == 17
        and digits.names[7] == "7 - seven"
    )


def test_damaged_fashion_mnist_is_named(fashion):
    images, labels = (
        fashion / "FashionMNIST" / "raw" / name for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    )
    content = images.read_bytes()
    for damaged in (content[:-1], b"", b"<html>not found</html>" * 50, struct.pack(">ii", 2049, 12) + bytes(12)):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{images} is damaged.*fetch it again"):
            fashion_mnist(fashion)
    images.write_bytes(content)
    labels.write_bytes(struct.pack(">ii", 2049, 11) + bytes(11))
    with pytest.raises(ValueError, match="12 train images but 11 labels"):
        fashion_mnist(fashion)
    labels.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"{labels} is missing; unpack the files of .*dataset-fashion-mnist there, or pass download=True",
    ):
        fashion_mnist(fashion)
    labels.with_name(f"{labels.name}.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(FileNotFoundError, match=rf"{labels} is missing; gunzip the {labels.name}.gz that is there"):
        fashion_mnist(fashion)


def jpeg(path, colour, *, grey=False):
    """An even JPEG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (64, 64), colour[0]) if grey else Image.new("RGB", (64, 64), colour)
    image.save(path, "JPEG", quality=95)


@pytest.fixture
def tiny(tmp_path):
    """Three classes of two training images and one for validation; one image in four is grey, as in the original."""
    place = tmp_path / "tiny-imagenet-200"
    place.mkdir()
    wnids = ["n02124075", "n01443537", "n04067472"]
    (place / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (place / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn04067472\treel\n"
    )
    lines = []
    for i, wnid in enumerate(wnids):
        for j in range(2):
            jpeg(place / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", (60 * i, 100 * j, 50), grey=i == j == 1)
        jpeg(place / "val" / "images" / f"val_{i}.JPEG", (200, 60 * i, 50))
        lines.append(f"val_{i}.JPEG\t{wnids[2 - i]}\t0\t0\t62\t62\n")
        (place / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (place / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet(tiny):
    train, test, both = (tiny_imagenet(tiny, part) for part in ("train", "test", "all"))
    assert train.names == ("Egyptian cat", "goldfish, Carassius auratus", "reel") == test.names
    assert (
        train.images.shape == (6, 3, 64, 64)
        and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        and test.labels.tolist() == [2, 1, 0]
    )
    expected = torch.tensor(
        [[60 * i, 100 * j, 50] if not i == j == 1 else [60, 60, 60] for i in range(3) for j in range(2)]
    )
    assert (train.images.float().mean((2, 3)) - expected).abs().max() < 4  # JPEG
    assert (test.images.float().mean((2, 3)) - torch.tensor([[200, 60 * i, 50] for i in range(3)])).abs().max() < 4
    assert torch.equal(both.images, torch.cat([train.images, test.images]))
    assert tiny_imagenet(tiny, size=32).images.shape == (6, 3, 32, 32)


def test_damaged_tiny_imagenet_is_named(tiny):
    place = tiny / "tiny-imagenet-200"
    victim = place / "train" / "n01443537" / "images" / "n01443537_1.JPEG"
    content = victim.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no image"):
        victim.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{victim} is damaged or no image"):
            tiny_imagenet(tiny)
    annotations = place / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn99999999\t0\t0\t62\t62\n")
    with pytest.raises(ValueError, match=rf"{annotations} is damaged: line 1 .*n99999999"):
        tiny_imagenet(tiny, "test")
    annotations.write_text("val_7.JPEG\tn01443537\t0\t0\t62\t62\n")
    with pytest.raises(FileNotFoundError, match=r"val_7.JPEG is missing"):
        tiny_imagenet(tiny, "test")
    for file in victim.parent.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{victim.parent} has no \*.JPEG"):
        tiny_imagenet(tiny)
    (place / "wnids.txt").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"{place}/wnids.txt is missing; unpack \S*tiny-imagenet-200.zip in {tiny}, or pass download=True",
    ):
        tiny_imagenet(tiny)


def test_a_folder_of_images(tmp_path):
    jpeg(tmp_path / "bee" / "a.jpg", (10, 20, 30))
    jpeg(tmp_path / "ant" / "b.jpg", (100, 0, 0), grey=True)
    Image.new("RGBA", (50, 30), (250, 0, 0, 255)).save(tmp_path / "ant" / "c.png")
    data = folder(tmp_path, size=16)
    assert data.names == ("ant", "bee") and data.labels.tolist() == [0, 0, 1] and data.images.shape == (3, 3, 16, 16)
    assert (
        data.images.float().mean((2, 3)) - torch.tensor([[100, 100, 100], [250, 0, 0], [10, 20, 30]])
    ).abs().max() < 4


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nowhere is not a folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        folder(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(FileNotFoundError, match="ant"):
        folder(tmp_path)
    (tmp_path / "ant" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{tmp_path}/ant/a.png is damaged or no image"):
        folder(tmp_path)


def test_torchvision_is_optional_and_its_absence_named():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import metaopt as mo\n"
        "try: mo.tasks.cifar10('.')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'metaopt[vision]'" in shown


def test_torchvision_is_mended_for_its_own_error_alone(monkeypatch):
    before = set(sys.modules)
    original = importlib.import_module
    errors = [RuntimeError("operator torchvision::nms does not exist")]
    monkeypatch.setattr(_torchvision, "_declared", lambda: None)
    monkeypatch.setitem(sys.modules, "torchvision.leftover", torch)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # put back afterwards

    def fails_once(name):
        if errors:
            raise errors.pop()
        assert "torchvision.leftover" not in sys.modules
        return SimpleNamespace(datasets=original("json"))

    monkeypatch.setattr(importlib, "import_module", fails_once)
    assert _torchvision.datasets().__name__ == "json"
    errors.append(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.datasets()
    errors.append(ModuleNotFoundError("No module named 'numbers9'", name="numbers9"))
    with pytest.raises(ModuleNotFoundError, match="numbers9"):
        _torchvision.datasets()
    monkeypatch.undo()
    assert before <= set(sys.modules)
