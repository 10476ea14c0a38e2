"""A headless Chromium for tests that click: playwright and a Chromium of the system, neither of which is installed here
by the package.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def needs_browser(test):
    """Marks a test that opens a page; it is skipped where there is no browser."""
    missing = CHROMIUM is None or find_spec("playwright") is None
    reason = "needs playwright and Chromium: pip install playwright; apt-get install chromium"
    return pytest.mark.browser(pytest.mark.skipif(missing, reason=reason)(test))


@pytest.fixture(scope="module")
def browser():
    """It closes with the module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
