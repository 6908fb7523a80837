#!/bin/sh
# Installs Chromium for tests/test_page.py, which looks at the report's page, or says what is missing and goes on.
without() {
    printf '%s\n' "Chromium is NOT installed: $1. The report's page will not be looked at by the tests." >&2
    exit 0
}

for program in chromium chromium-browser google-chrome; do
    command -v "$program" >/dev/null && exit 0
done
command -v apt-get >/dev/null || without "no apt-get on this system; install it by hand"
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
    without "this user may not install it; ask for: apt-get install chromium"
fi
echo "installing chromium for the report's tests (a minute or two)"
{ $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
    >/dev/null 2>&1 || without "apt-get could not install it"
