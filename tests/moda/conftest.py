"""What tests of several folders share: a browser to look at pages with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.moda._helpers.browser import Browser, why_no_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; without one the test is skipped."""
    if (reason := why_no_browser()) is not None:
        pytest.skip(reason)
    opened = Browser.open()
    yield opened
    opened.close()
