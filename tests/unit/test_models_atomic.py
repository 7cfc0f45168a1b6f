"""Files that appear complete or not at all."""

import pytest

from pyrolora.models.atomic import replacing


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
