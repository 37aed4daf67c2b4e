#!/usr/bin/env bash
# Gives the tests of pages their browser, Debian's chromium with its driver, where that can be done: as root, with apt.
# Elsewhere it does nothing, and those tests are skipped with the reason.
set -euo pipefail
if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; } > /dev/null 2>&1 \
        || echo "tests/browser.sh: chromium could not be installed; tests of pages will be skipped" >&2
else
    echo "tests/browser.sh: no chromium, and no right to install it; tests of pages will be skipped" >&2
fi
