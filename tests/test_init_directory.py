"""init_directory.py makes the folders, and no more."""

from init_directory import FOLDERS, init_directory


def test_init_directory_makes_the_folders_and_may_run_twice(tmp_path):
    init_directory(tmp_path)
    init_directory(tmp_path)
    assert all((tmp_path / folder).is_dir() for folder in FOLDERS)
    top = {folder.split("/")[0] for folder in FOLDERS}
    assert {path.name for path in tmp_path.iterdir()} == top
