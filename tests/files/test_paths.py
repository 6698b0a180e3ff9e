"""Where a folder will lie, and which names stay in their folder.

pytest tests/files/test_paths.py
"""

from pathlib import Path

import pytest

from wandistiller.files.paths import nearest_existing, stays_inside


def test_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_existing("a/b") == Path(".")


@pytest.mark.parametrize("name", ["a.safetensors", "a/b.safetensors", "./a", "..a"])
def test_names_of_files_in_the_folder_or_below_stay_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/../../b", "..\\a", "C:\\a", None, 7, ["a"]])
def test_all_other_names_do_not(name):
    assert not stays_inside(name)
