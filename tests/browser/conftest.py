"""A real browser: skipped with a reason where there is none, failed where it is required."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the program."""
    names = (os.environ.get("ERNIE_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        reason = "no chromium found: apt-get install chromium, or name one in ERNIE_CHROMIUM"
        if os.environ.get("ERNIE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return found
