"""Where the lab keeps what it makes, and the names by which it knows its own."""

from __future__ import annotations

import os
from pathlib import Path

#: Everything of a running lab; root only; removed by `lab down`.
STATE = Path("/var/lib/censuschat-lab")
#: Begins the name of every container, volume and network namespace of the lab; nothing without it is touched.
PREFIX = "censuslab-"
#: Every container and volume of the lab carries it.
LABEL = "censuschat.lab=true"
#: The repository of the node images in podman's store.
IMAGES = "localhost/censuschat-lab"
REPO = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The project's cache directory: what may be deleted at the price of making it again."""
    named = os.environ.get("CENSUSCHAT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "censuschat-infra"
