"""Files and folders that appear complete or not at all."""

import os
import shutil
import tempfile
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


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill in place of one, which takes its name when the block ends well.

    Usage::

        with replacing_folder("runs/posterior") as partial:
            (partial / "settings.json").write_text(text)

    Parents are made if they are missing. A block that fails leaves what stood there and nothing beside it.

    Args:
        folder: the folder; one that exists is replaced whole.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    replaced = None
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            replaced = partial.with_name(partial.name + "-old")
            os.replace(folder, replaced)
        os.replace(partial, folder)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced is not None and not folder.exists():
            os.replace(replaced, folder)
        raise
