"""Folders behind a URL: a file system of fsspec stands for one, here or in memory."""

import json
import os
import time

import pytest

from vptq.errors import UsageError
from vptq.models import lock, remote
from vptq.models.files import save_json, standing_folder, whole_stream
from vptq.models.lock import lock_folder
from vptq.models.remote import fetch, fetch_all, local_folder, mirror_of, reading, remove, shown


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "here"))
    monkeypatch.setattr(remote, "_mirrors", {})
    monkeypatch.setattr(lock, "SETTLES_IN", 0.0)
    (tmp_path / "there").mkdir()
    return f"local://{tmp_path}/there/out"


@pytest.fixture
def there(tmp_path):
    return tmp_path / "there" / "out"


def test_a_path_is_itself(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path and mirror_of(tmp_path) is None and shown(tmp_path) == str(tmp_path)


def test_what_is_written_is_there_and_what_is_there_is_read(url, there):
    folder = local_folder(url)
    save_json(folder / "a" / "b.json", [1])
    assert json.loads((there / "a" / "b.json").read_text()) == [1]
    assert shown(folder / "a" / "b.json") == f"{url}/a/b.json"
    (folder / "a" / "b.json").unlink()
    assert json.loads(fetch(folder / "a" / "b.json").read_text()) == [1]
    assert not fetch(folder / "nothing").exists()
    assert not [name for name in os.listdir(there / "a") if name.endswith(".partial")]


def test_a_folder_is_published_when_it_has_its_name(url, there, monkeypatch):
    folder = local_folder(url)
    save_json(folder / "model.partial" / "x.json", 1)
    assert not (there / "model.partial").exists()
    save_json(folder / "model.partial" / "config.json", 1)
    os.replace(folder / "model.partial", folder / "model")
    order = []
    monkeypatch.setattr(remote, "publish", lambda path: order.append(path.name))
    remote.publish_folder(folder / "model", "config.json")
    assert order == ["x.json", "config.json"]
    monkeypatch.undo()
    remote.publish_folder(folder / "model", "config.json")


def test_streams_pass_the_mirror(url, there):
    folder = local_folder(url)
    with whole_stream(folder / "s" / "big") as file:
        file.write(b"12345")
    assert (there / "s" / "big").read_bytes() == b"12345" and not (folder / "s" / "big").exists()
    with reading(folder / "s" / "big") as file:
        assert file.read() == b"12345"
    with pytest.raises(ZeroDivisionError), whole_stream(folder / "s" / "half") as file:
        raise ZeroDivisionError
    assert not (there / "s" / "half").exists()
    remove(folder / "s")
    assert not (there / "s").exists()


def test_a_mirror_becomes_what_is_there(url, there):
    folder = local_folder(url)
    save_json(folder / "kept.json", 1)
    save_json(folder / "gone.json", 1)
    save_json(folder / "scratch" / "x.json", 1)
    (there / "gone.json").unlink()
    (there / "kept.json").write_text("2")
    fetch_all(folder, but=("scratch",))
    assert sorted(p.name for p in folder.iterdir()) == ["kept.json", "scratch"]
    assert (folder / "kept.json").read_text() == "2"


def test_a_second_process_is_refused_until_the_first_is_dead(url, monkeypatch):
    folder = local_folder(url)
    held = lock_folder(folder)
    elsewhere = local_folder(url + "/../out")  # as on another machine: another mirror of the same place
    with pytest.raises(UsageError, match=r"another process works in `local://(.|\n)*wait 90 s"):
        lock_folder(elsewhere)
    now = time.time()
    monkeypatch.setattr(lock.time, "time", lambda: now + 100)
    lock_folder(elsewhere).release()
    monkeypatch.undo()
    held.release()


def test_a_lock_that_somebody_took_over_is_known_as_lost(url, there, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.1)
    held = lock_folder(local_folder(url))
    time.sleep(0.3)
    assert not held.is_lost
    for _ in range(10):  # the other writes again where a renewal under way came between
        (there / ".lock").write_text(json.dumps({"owner": "another", "time": time.time()}))
        time.sleep(0.5)
        if held.is_lost:
            break
    assert held.is_lost
    held.release()
    assert (there / ".lock").exists(), "it is the other's"


def test_the_lock_is_given_back(url, there):
    folder = local_folder(url)
    for _ in range(2):
        lock_folder(folder).release()
    assert not (there / ".lock").exists()


def test_what_can_not_be_reached_is_said():
    with pytest.raises(UsageError, match=r"`nosuch://x` can't be reached"):
        local_folder("nosuch://x")


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"can't be locked(.|\n)*Function not implemented(.|\n)*mount it with locks"):
        lock_folder(tmp_path)


def test_a_folder_that_one_may_not_look_into_is_a_users_fault(tmp_path, monkeypatch):
    assert standing_folder(tmp_path / "a" / "b") == tmp_path

    def refuse(path, **how):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "exists", refuse)
    with pytest.raises(UsageError, match="can't be looked at"):
        standing_folder(tmp_path / "a")
