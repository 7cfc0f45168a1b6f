"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to in place of a file's own, which the file gets when the block ends well.

    Usage::

        with replacing("runs/curve.json") as partial:
            partial.write_text(text)

    The folder is made if it is missing. A block that fails leaves the file as it was and nothing beside it.

    Args:
        path: the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process alone, so that two writers of one file do not meet
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
