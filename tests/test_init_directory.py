"""init_directory.py makes the folders, and no more."""

import pytest

from experiment.run import run
from init_directory import FOLDERS, init_directory


def test_init_directory_makes_the_folders_and_may_run_twice(tmp_path):
    init_directory(tmp_path)
    init_directory(tmp_path)
    assert all((tmp_path / folder).is_dir() for folder in FOLDERS)
    top = {folder.split("/")[0] for folder in FOLDERS}
    assert {path.name for path in tmp_path.iterdir()} == top


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(SystemExit) as end:
        run(lambda: init_directory(tmp_path))
    assert end.value.code == 2 and str(tmp_path / "data") in capsys.readouterr().err
