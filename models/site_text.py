"""The sites of a model as a table of text."""

from collections.abc import Mapping
from typing import Any

from pyrolora.models.sites import SiteTable


def site_text(sites: SiteTable, priors: Mapping[str, Mapping[str, Any]]) -> str:
    """Name, shape, dims, prior and number of weights of every site, a line each: ``site_text(model.sites, prior.to_dict())``.

    Args:
        sites: the sites.
        priors: site name -> description of its prior; sites left out were sampled by one.
    """
    rows = [("site", "shape", "dims", "prior", "weights")]
    for name, site in sites.items():
        prior = _one_line(priors[name]) if name in priors else "sampled by a prior"
        rows.append((name, str(tuple(site.shape)), ", ".join(site.dims), prior, f"{site.numel:,}"))
    total = sum(site.numel for site in sites.values())
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _one_line(entry: Mapping[str, Any]) -> str:
    settings = entry.get("parameters") or {key: value for key, value in entry.items() if key not in ("prior", "name")}
    if entry["prior"] == "callable":
        return f"{entry['name']}(site)"
    return f"{entry['prior']}({', '.join(f'{key}={_short(value)}' for key, value in settings.items())})"


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return f"({', '.join(value)})"
    return f"{value:.4g}" if isinstance(value, float) else "[...]" if isinstance(value, list) else str(value)
