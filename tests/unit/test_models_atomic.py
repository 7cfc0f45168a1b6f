"""Files and folders that appear complete or not at all."""

import os

import pytest

from pyrolora.models.atomic import replacing, replacing_folder


def test_a_file_is_replaced_when_the_block_ends_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
        assert partial.parent == path.parent, "another file system could not be renamed from"
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def stopped():
        with replacing(path) as partial:
            partial.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


class TestFolders:
    def test_a_whole_folder_takes_the_place_of_the_old_one(self, tmp_path):
        folder = tmp_path / "deep" / "kept"
        for text in ("first", "second"):
            with replacing_folder(folder) as partial:
                (partial / f"{text}.txt").write_text(text)
        assert [path.name for path in folder.iterdir()] == ["second.txt"]
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("fails", ["writing", "renaming"])
    def test_a_failure_leaves_the_old_folder_and_nothing_beside_it(self, tmp_path, monkeypatch, fails):
        folder = tmp_path / "kept"
        with replacing_folder(folder) as partial:
            (partial / "first.txt").write_text("first")
        real = os.replace

        def broken(source, target):
            if fails == "renaming" and target == folder and not str(source).endswith("-old"):
                raise OSError("disk full")
            real(source, target)

        monkeypatch.setattr(os, "replace", broken)

        def write():
            with replacing_folder(folder) as partial:
                (partial / "second.txt").write_text("second")
                if fails == "writing":
                    raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write()
        assert [path.name for path in folder.iterdir()] == ["first.txt"]
        assert list(tmp_path.iterdir()) == [folder]
