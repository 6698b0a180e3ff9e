"""Files and folders appear whole or not at all, and leave nothing beside them when they fail."""

import time

import pytest
import torch

from support.processes import fork
from wandistiller.files.atomic import atomic_folder, atomic_path, remove_leftovers, write_json, write_text
from wandistiller.files.tensor_files import write_tensors


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127 + "n"])
def test_a_name_as_long_as_file_systems_take_is_written_and_its_leftovers_removed(tmp_path, name):
    write_text(tmp_path / name, "whole \udce9")  # a letter of a path that is no UTF-8
    assert (tmp_path / name).read_text(encoding="utf-8") == "whole ?"
    with pytest.raises(OSError), atomic_path(tmp_path / name) as beside:
        kept, left = tmp_path / "kept", beside.parent
        left.rename(kept)
        raise OSError
    kept.rename(left)
    remove_leftovers(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, stop):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(stop), atomic_path(path) as beside:
        beside.write_bytes(b"half")
        raise stop
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "made" / "out") as beside:
        (beside / "half").write_bytes(b"half")
        raise OSError("full")
    assert not list((tmp_path / "made").iterdir())
    with atomic_folder(tmp_path / "made" / "out") as beside:
        (beside / "file").write_bytes(b"whole")
    assert (tmp_path / "made" / "out" / "file").read_bytes() == b"whole"


def test_leftovers_of_a_killed_write_are_removed_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.json", "{}")
    (tmp_path / ".a.json.0123abcd.tmp").write_text("half")
    (tmp_path / ".a.json.of_mine.tmp").write_text("mine")
    (tmp_path / ".a.json.76543210.tmp").symlink_to(tmp_path / ".a.json.of_mine.tmp")  # a link of a stranger's folder
    remove_leftovers(tmp_path / "a.json")
    left = {".a.json.of_mine.tmp", ".a.json.76543210.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *left}
    assert all((tmp_path / name).read_text() == "mine" for name in left)


def test_what_was_private_stays_so(tmp_path):
    file, plain = tmp_path / "digests.json", tmp_path / "plain"
    write_json(file, [1])
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode
    file.chmod(0o600)
    write_json(file, [2])
    assert file.stat().st_mode & 0o777 == 0o600


def test_tensors_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_for_ever(path) -> None:
    while True:
        write_tensors(path, {"a": torch.zeros(2**23)})


def test_what_a_killed_process_was_writing_with_safetensors_is_removed(tmp_path):
    """The library writes files of its own, under names that tell nothing of us."""
    path = tmp_path / "a.safetensors"
    for _ in range(5):
        writer = fork(write_for_ever, path)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        writer.kill()
        writer.join()
        remove_leftovers(path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        path.unlink()
