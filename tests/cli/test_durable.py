"""What a command leaves for a later one is there after a power cut, as it was or as it is."""

import os
from pathlib import Path

import pytest

from shardkv.cli import bulk, demo
from shardkv.cli.durable import replace_durably


class Disk:
    """Notes the order in which files are synced, renamed and removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.done.append(f"sync {path.name}: {path.read_text()}" if path.is_file() else f"sync {path.name}")

        def noted_replace(source: Path, target: Path) -> Path:
            self.done.append(f"rename {source.name} {target.name}")
            return replace(source, target)

        def noted_unlink(path: Path, missing_ok: bool = False) -> None:
            self.done.append(f"remove {path.name}")
            unlink(path, missing_ok)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(Path, "replace", noted_replace)
        monkeypatch.setattr(Path, "unlink", noted_unlink)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "d"
    path.mkdir()
    return path


def test_a_file_is_synced_before_it_gets_its_name_and_its_directory_after_it(disk: Disk, directory: Path) -> None:
    """A rename may be on disk before the content is: then the file would be empty."""
    path = directory / "f"
    for content in ("one, and long", "two"):
        replace_durably(path, content)
        assert path.read_text() == content
        assert disk.done == [f"sync f.new: {content}", "rename f.new f", "sync d"]
        disk.done.clear()
    assert os.listdir(directory) == ["f"]


def test_a_directory_that_cannot_be_synced_is_no_hindrance(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    replace_durably(directory / "f", "content")
    assert (directory / "f").read_text() == "content"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_file_that_cannot_be_replaced_is_as_it_was_and_alone(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failing: str, problem: BaseException
) -> None:
    """What had been written of the new one stayed beside it."""

    def fail(*_: object) -> None:
        raise problem

    (directory / "f").write_text("one")
    with monkeypatch.context() as broken:
        broken.setattr(os if failing == "fsync" else Path, failing, fail)
        with pytest.raises(type(problem)):
            replace_durably(directory / "f", "two")
    assert (directory / "f").read_text() == "one"
    assert os.listdir(directory) == ["f"]


def test_how_far_an_export_came_is_on_disk_before_more_of_it_is(disk: Disk, directory: Path) -> None:
    """Without it half of an export would pass for the whole, and by an older one it went on in the middle of a line."""
    checkpoint = bulk.Checkpoint(str(directory / "all.jsonl"), {"command": "export"})
    checkpoint.save(count=3, offset=10)
    assert disk.done[0].startswith("sync all.jsonl.progress.new: {")
    assert disk.done[1:] == ["rename all.jsonl.progress.new all.jsonl.progress", "sync d"]


def test_a_note_of_how_far_a_finished_import_came_does_not_come_back(disk: Disk, directory: Path) -> None:
    """A later --resume would have put what the end of the file says over what was written since."""
    checkpoint = bulk.Checkpoint(str(directory / "all.jsonl"), {"command": "import"})
    with checkpoint.kept():
        checkpoint.save(count=3, offset=10)
        disk.done.clear()
    assert disk.done == ["remove all.jsonl.progress", "sync d"]
    assert os.listdir(directory) == []
    checkpoint.remove()


def test_where_the_nodes_of_a_demo_are_is_on_disk_before_they_start(disk: Disk, directory: Path) -> None:
    """The file was empty after a power cut, and the demo would not start on its data again."""
    demo._cluster_on(directory, 1, 7001, False)
    assert disk.done[0] == 'sync demo.json.new: {"nodes": 1, "addresses": {"n1": "127.0.0.1:7001"}}'
    assert disk.done[1:] == ["rename demo.json.new demo.json", "sync d"]
