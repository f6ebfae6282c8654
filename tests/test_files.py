"""An output appears whole or not at all."""

import os
import signal

import pandas as pd
import pytest

from chest.errors import InputError, Problem, printable, refuse, run
from chest.files import read_table, replacing, together, write_json, write_table, write_text
from chest.running import Interrupted


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.csv"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_a_failure_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.csv", "old")]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "a"
    for name in ("first", "second"):
        with replacing(folder) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), replacing(folder) as partial:
        partial.mkdir()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["second"]


def test_what_an_interrupted_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    with replacing(tmp_path / "a") as partial:
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_making_room_when_the_run_was_killed_is_put_back(tmp_path):
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "before").write_text("x")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as partial:
        partial.mkdir()
        raise RuntimeError
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["a", "a/before"]
    (tmp_path / ".a.old").mkdir()
    with replacing(tmp_path / "a") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize("error", [Interrupted(15), OSError(28, "No space left on device")])
@pytest.mark.parametrize("struck", [1, 2])
def test_a_folder_struck_while_it_is_replaced_is_the_old_or_the_new(
    tmp_path, monkeypatch, error, struck
):
    folder = tmp_path / "a"
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / "old").write_text("")
    done, replace = [], os.replace

    def strike(source, target):
        done.append(source)
        if len(done) == struck:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", strike)
    with pytest.raises(type(error)), replacing(folder) as partial:
        partial.mkdir()
        (partial / "new").write_text("")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_a_folder_behind_a_link_is_replaced_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("")
    (tmp_path / "a").symlink_to("disk")
    (tmp_path / "b").symlink_to("nowhere")
    for name in ("a", "b"):
        with replacing(tmp_path / name) as partial:
            partial.mkdir()
            (partial / "new").write_text("")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a", "b", "b/new", "disk", "disk/new"]
    assert (tmp_path / "a").is_symlink()


def write_both(folder, content):
    write_text(folder / "a.csv", content)
    with replacing(folder / "b") as partial:
        partial.mkdir()
        (partial / "c.csv").write_text(content)


def test_what_is_written_together_appears_together(tmp_path):
    with together():
        with together():
            write_both(tmp_path, "old")
        assert not (tmp_path / "a.csv").exists()
    with pytest.raises(OSError, match="full"), together():
        write_both(tmp_path, "new")
        raise OSError(28, "full")
    files = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.csv")}
    assert files == {"a.csv": "old", "b/c.csv": "old"}
    write_both(tmp_path, "new")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b/c.csv").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b"]


def test_a_signal_waits_until_all_have_their_place(tmp_path, monkeypatch):
    replace, done = os.replace, []

    def strike(source, target):
        if not done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", strike)
    with pytest.raises(Interrupted), together():
        write_both(tmp_path, "new")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b/c.csv").read_text() == "new"


def test_numbers_that_are_none_do_not_get_into_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"uar": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tables_are_read_as_they_were_written(tmp_path):
    table = pd.DataFrame({"id": ["001", "NA"], "name": ["a,b\nc", "é"]})
    write_table(tmp_path / "a.csv", table)
    assert read_table(tmp_path / "a.csv", ["id", "name"]).equals(table)


@pytest.mark.parametrize("content", [None, b"", b"id\n1\n", b"id,name,more\n1,2,3\n", b"\xff\xfe"])
def test_another_table_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match="the columns id,name"):
        read_table(tmp_path / "a.csv", ["id", "name"])


def test_all_problems_are_told_in_order_with_what_to_do():
    refuse([])
    with pytest.raises(InputError) as error:
        refuse([Problem(name, "found this", "that", "do so") for name in ("b", "a")])
    lines = str(error.value).splitlines()
    assert lines[0] == "2 problems with the input:"
    assert [line.strip() for line in lines[1:5]] == [
        "a", "found:    found this", "expected: that", "to do:    do so",
    ]  # fmt: skip


def test_names_with_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\n\udcff") == "a\\x1b[2Jb\\n\\udcff"


def test_an_error_of_the_user_ends_a_script_with_its_message_and_1(capsys):
    def main():
        raise InputError([Problem("x.png", "nothing", "a picture", "fetch it")])

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("ERROR: 1 problem with the input:\n  x.png")
