"""Folders that are made once from a file and kept: dequantised and converted weights."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted weights are kept: ``$PYROLORA_CACHE``, else ``pyrolora`` under the user's cache folder."""
    if own := os.environ.get("PYROLORA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pyrolora"


def made_once(file: Path, write: Callable[[Path], None], what: str) -> Path:
    """The folder that ``write`` fills from a file on first use: ``made_once(gguf, dequantise, "Dequantising")``.

    Args:
        file: what the folder is made from; its content names the folder.
        write: fills the folder that it is given.
        what: the work, for the log.

    Returns:
        A folder that is whole, whoever else makes it at the same time.
    """
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{digest}"
    if folder.is_dir():
        return folder
    logger.info("%s %s once; later loads read %s", what, file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        write(partial)
        (partial / "source.json").write_text(json.dumps({"file": file.name, "sha256": digest}))
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError:
        # another process may have finished the same folder first
        if not folder.is_dir():
            raise
    finally:
        # after success there is nothing of that name; after Ctrl-C or a full disk there is half a model
        shutil.rmtree(partial, ignore_errors=True)
    return folder
