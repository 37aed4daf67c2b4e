#!/usr/bin/env bash
# Gives the tests of pages their browser, Debian's chromium with its driver, where that can be done: with apt, as root or with a
# sudo that asks for no password. Elsewhere it only says so, and those tests are skipped with one line.
set -euo pipefail

have() { command -v "$1" > /dev/null; }
if { have chromium || have google-chrome; } && have chromedriver; then exit 0; fi

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
if ! have apt-get || ! "${as_root[@]}" true 2> /dev/null; then
    echo ".ci/browser.sh: no chromium, and no right to install it; tests of pages will be skipped" >&2
    exit 0
fi
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get)
if ! { "${install[@]}" update -qq &&
    "${install[@]}" install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; } > /dev/null 2>&1; then
    echo ".ci/browser.sh: chromium could not be installed; tests of pages will be skipped" >&2
fi
