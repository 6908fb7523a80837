#!/bin/sh
# Installs FFCV and the system libraries it builds against, or says exactly what is missing and goes on without it.
python=$1
packages="libopencv-dev libturbojpeg0-dev pkg-config"

without() {
    printf '\n%s\n' "************************************************************************" >&2
    printf '%s\n' "FFCV is NOT installed: $1" \
        "The ffcv loader and 'fastarat data prepare' will not work; the resident loader does." \
        "To add it: apt-get install $packages, then: $python -m pip install 'ffcv==1.0.2'" >&2
    printf '%s\n\n' "************************************************************************" >&2
    exit 0
}

marker=$(dirname "$(dirname "$python")")/.ffcv
rm -f "$marker"
if ! { pkg-config --exists opencv4 && pkg-config --exists libturbojpeg; } 2>/dev/null; then
    command -v apt-get >/dev/null || without "it needs Debian's $packages (no apt-get on this system)"
    if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
        without "it needs $packages, and this user may not install them"
    fi
    echo "installing $packages for FFCV (some minutes on a bare system)"
    { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $packages g++; } \
        >/dev/null 2>&1 || without "apt-get could not install $packages"
fi
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ffcv==1.0.2' || without "pip could not build it"
"$python" -c 'import ffcv' || without "it was built and does not import"
touch "$marker"
