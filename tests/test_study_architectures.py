"""studies/architectures.py: what it saves, draws again, and says of bad input."""

import json

import pytest

import architectures
from architectures import CNNS

pytest.importorskip("transformers")


def test_each_cnn_keeps_its_outputs_and_is_drawn_again(tmp_path, call):
    options = "--output", tmp_path, "--architecture", *CNNS
    done = call(architectures, *options, "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert f"{len(CNNS)} architectures, 0 wrong" in done.stdout
    (folder,) = (tmp_path / "figures" / "architectures").iterdir()
    found = json.loads((folder / "architectures.json").read_text("utf-8"))
    for name, a in found.items():
        assert a["units"] > 0 and a["changed"] < 1e-10 < 1e-3 < a["one_side"], name
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.glob("*.[pm]*"):
        path.unlink()
    assert call(architectures, *options, "--plot-only").returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_what_cannot_be_built_is_named_and_unknown_names_are_refused(tmp_path, call):
    options = "--output", tmp_path, "--processes", 1, "--architecture"
    done = call(architectures, *options, "VGG", "fuyu")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "figures" / "architectures").iterdir()
    assert "1 were not built:\n\n- causal/fuyu: ValueError" in (folder / "table.md").read_text(
        "utf-8"
    )
    done = call(architectures, *options, "nothing")
    assert done.returncode == 2 and "no architecture nothing" in done.stderr
