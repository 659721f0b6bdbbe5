"""What the unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def keys_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test makes or uses a key of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("config")
        patch.setenv("XDG_CONFIG_HOME", str(place))
        yield place
