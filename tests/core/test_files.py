"""Outputs appear whole or not at all; tables arrive as they were written."""

import os

import pandas as pd
import pytest

from chest.core.errors import InputError
from chest.core.files import read_table, replacing, write_json, write_table


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failure_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    with replacing(tmp_path / "a") as partial:
        partial.touch()
    partial.mkdir()
    (partial / "half").touch()
    write_json(tmp_path / "a", {"b": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = pd.DataFrame({"id": ["007", "NA", ""], "text": ["a,b", 'a "b"', "ä"]})
    write_table(tmp_path / "a.csv", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv", ["id", "text"]), table)


@pytest.mark.parametrize(
    "content", [None, b"", b"id\n1\n", b"id,text,more\n1,2,3\n", b"id,text\n1,2,3\n", b"\xff\xfe"]
)
def test_a_table_of_another_form_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.csv") as caught:
        read_table(tmp_path / "a.csv", ["id", "text"])
    assert "dvc repro" in str(caught.value)


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_files_get_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / "weights").touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "folder/weights").stat().st_mode & 0o777 == 0o644
