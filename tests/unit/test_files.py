"""Files and folders are written whole or not at all, whoever else writes or is killed, and nothing else is ever replaced."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from routevl import files
from routevl.errors import RoutevlError
from routevl.files import atomic_file, atomic_folder, check_replaceable, write_json

ROUTEVL = str(Path(sys.executable).with_name("routevl"))


def write(path: Path, text: str, *more: str) -> None:
    with atomic_folder(path, "run.json") as folder:
        for name in ("run.json", *more):
            (folder / name).write_text(text)


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_b05_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models / "run", "first")
    with pytest.raises(RoutevlError, match=r"models: holds run and no run\.json, so it is not of this stage"):
        write(models, "second")
    (tmp_path / "file").write_text("a user's")
    with pytest.raises(RoutevlError, match="file: stands there and is no folder"):
        write(tmp_path / "file", "second")
    assert (models / "run/run.json").read_text() == "first" and (tmp_path / "file").read_text() == "a user's"
    write(models / "run", "second")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "third")
    assert (models / "run/run.json").read_text() == "second" and (tmp_path / "empty/run.json").read_text() == "third"


def test_b05_a_file_of_the_users_in_an_own_folder_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    write(tmp_path / "run", "first")
    (tmp_path / "run/notes.txt").write_text("a user's")
    with pytest.raises(RoutevlError, match=r"run holds notes\.txt too, so it is not replaced; what was made is in .*run\.new-"):
        write(tmp_path / "run", "second")
    [kept] = tmp_path.glob("run.new-*")
    assert (kept / "run.json").read_text() == "second"
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {
        "run.json": "first",
        "notes.txt": "a user's",
    }


STAGES = {
    "world": "--seed 1 --train-images 1 --val-images 1 --test-images 1 --image-size 24 --questions-per-image 1 --output",
    "score": "--task vqa --split-folder nowhere --predictions nowhere --output",
}


@pytest.mark.parametrize("stage", STAGES)
def test_b05_stages_refuse_a_folder_of_the_users_before_they_work(stage: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("a user's")
    command = [ROUTEVL, stage, *STAGES[stage].split(), str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "home: holds thesis.tex and no " in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path / "home") == ["thesis.tex"] and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("one_step", [True, False])
def test_b06_a_folder_is_renamed_aside_and_in(one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step there is no moment without a whole folder; also where the system has no such step the new one comes in."""
    if not one_step:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    write(tmp_path / "run", "0", "a", "b")
    missing, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            for name in ("run.json", "a", "b"):
                if not (tmp_path / "run" / name).exists():
                    missing.append(name)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        write(tmp_path / "run", str(number), "a", "b")
    done.set()
    reader.join()
    assert (tmp_path / "run/a").read_text() == "39" and hidden(tmp_path) == []
    assert not one_step or not missing


def test_b06_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    flush, rename = files._flush_to_disk, os.replace
    monkeypatch.setattr(files, "_flush_to_disk", lambda path: (calls.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(files, "_flush_all_to_disk", lambda path: calls.append(("flush all", path.name)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("rename", Path(new).name)), rename(old, new)))
    write_json(tmp_path / "a.json", 1)
    write(tmp_path / "run", "first")
    parent = ("flush", tmp_path.name)
    assert calls == [("flush", "a.json"), ("rename", "a.json"), parent, ("flush all", "run"), ("rename", "run"), parent]


def test_b07_writers_with_equal_process_ids_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers on several nodes
    path = tmp_path / "shared.json"
    with atomic_file(path) as first:
        first.write_text("first")
        write_json(path, "second")
        assert path.read_text() == '"second"\n' and first.read_text() == "first"
    assert path.read_text() == "first" and hidden(tmp_path) == []


@pytest.mark.parametrize("write_part", [atomic_file, partial(atomic_folder, marker="a")], ids=["file", "folder"])
def test_b07_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path, write_part: Callable) -> None:
    path = tmp_path / "out"

    def die() -> None:
        with write_part(path) as temporary:
            (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=die)
    killed.start()
    killed.join()
    assert len(hidden(tmp_path)) == 1 and not path.exists()
    with write_part(path) as living:
        assert len(hidden(tmp_path)) == 1
        with write_part(path) as temporary:
            (temporary / "a" if temporary.is_dir() else temporary).write_text("whole")
        (living / "a" if living.is_dir() else living).write_text("later")
    assert hidden(tmp_path) == [] and (path / "a" if path.is_dir() else path).read_text() == "later"


def test_an_output_that_is_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    write(tmp_path / "run", "first")
    write(tmp_path / "run", "second")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "scratch/run.json").read_text() == "second"


def test_errors_name_the_path_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RoutevlError, match=r"could not write .*file/a\.json: File exists"):
        write_json(tmp_path / "file/a.json", 1)
    with pytest.raises(RoutevlError) as error, atomic_folder(tmp_path / "run", "a") as folder:
        raise RoutevlError(f"{folder / 'a'}: wrong")
    assert str(error.value) == f"{tmp_path / 'run' / 'a'}: wrong" and os.listdir(tmp_path) == ["file"]
    check_replaceable(tmp_path / "run", "a")


def test_a_lock_is_taken_where_its_folder_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held it removes the folder between its making and the opening of the file."""
    removed = []

    def open_after_removal(path: Path, *args: str, **kwargs: str) -> object:
        if not removed:
            removed.append(path.parent.rmdir())
        return open(path, *args, **kwargs)

    monkeypatch.setattr(files, "open", open_after_removal, raising=False)
    with files.lock(tmp_path / "run/lock") as held:
        assert (tmp_path / "run/lock").exists() and not held.closed and removed


def test_a_full_disk_is_said_where_a_library_fails_on_its_way_out(tmp_path: Path) -> None:
    """As matplotlib's PDF writer does: its AttributeError hides the error of the disk."""
    with (
        pytest.raises(RoutevlError, match=r"could not write .*figure\.pdf: No space left on device"),
        atomic_file(tmp_path / "figure.pdf"),
    ):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise AttributeError("'Stream' object has no attribute 'pos'")
    with pytest.raises(AttributeError), atomic_file(tmp_path / "figure.pdf"):  # a fault of ours stays one
        try:
            raise FileNotFoundError(errno.ENOENT, "nothing")
        except FileNotFoundError:
            raise AttributeError("wrong") from None
