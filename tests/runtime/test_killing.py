"""Processes that are killed: when they are told, and no other way of ending passes for it."""

import os

import pytest

import killed_things
from killing import in_child


def test_runs_to_its_end(tmp_path):
    ended = in_child(killed_things.three_files, tmp_path / "folder")
    assert (ended.killed, ended.result, ended.changes) == (False, "done", 11)
    assert len(list((tmp_path / "folder").iterdir())) == 3
    process, *values = in_child(killed_things.identity, 1, "two").result
    assert process != os.getpid()
    assert values == [1, "two"]


def test_is_killed_at_every_change(tmp_path):
    found = []
    for at_change in range(1, 12):
        folder = tmp_path / str(at_change)
        ended = in_child(killed_things.three_files, folder, at_change=at_change, seed=at_change)
        assert (ended.killed, ended.result, ended.changes) == (True, None, 0)
        found.append(len(list(folder.iterdir())) if folder.exists() else 0)
    assert found == sorted(found), "each time it came further"
    assert found[-1] == 3
    assert not in_child(killed_things.three_files, tmp_path / "12", at_change=12).killed


def test_a_write_may_be_done_in_part(tmp_path):
    done = set()
    for seed in range(12):
        path = tmp_path / str(seed)
        assert in_child(killed_things.large_file, path, at_change=3, seed=seed).killed
        content = path.read_bytes().rstrip(b"\0")
        assert content == b"x" * len(content)
        done.add(len(content) / (1 << 20))
    assert {0, 1} < done, "nothing, all, and parts"


def test_is_killed_after_a_while():
    ended = in_child(killed_things.for_ever, after_s=0.2)
    assert ended.killed
    assert ended.run_s >= 0.2
    assert not in_child(killed_things.identity, after_s=60).killed


def test_other_ends_are_failures():
    with pytest.raises(AssertionError, match=r"raised in its process\n(.*\n)*KeyboardInterrupt: of its own"):
        in_child(killed_things.raises)
    with pytest.raises(AssertionError, match="with exit code 3"):
        in_child(killed_things.ends_itself)
    with pytest.raises(AssertionError, match="has not ended in 1 s"):
        in_child(killed_things.for_ever, timeout_s=1)


def test_threads_work_in_a_forked_process():
    assert in_child(killed_things.computes).result == 512.0**3
