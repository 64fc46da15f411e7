from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers of the shipped model export their engines, once for all tests."""
    return tmp_path_factory.mktemp("cache")
