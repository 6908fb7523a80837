#!/bin/sh
# Installs the packages that tests/neighbours/ and the loggers' tests stand next to. torch stays the one that is there.
set -e
python=$1
marker=$(dirname "$(dirname "$python")")/.neighbours
rm -f "$marker"
version() { "$python" -c 'import torch; print(torch.__version__)'; }
before=$(version)
# Not compiled, which takes a third of the time: most of it is never imported.
"$python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[neighbours]'
# Without what they ask for: torchattacks wants the requests of 2021, robustbench exact versions of timm and gdown.
"$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -c constraints.txt torchattacks
# After it, whatever is there: the wheel of torchattacks brings a folder robustbench/ of its own, without `benchmark`.
"$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --force-reinstall -c constraints.txt \
    robustbench
after=$(version)
if [ "$before" != "$after" ]; then
    printf '%s\n' "installing the neighbours replaced torch $before by $after: pin what asked for it in constraints.txt" >&2
    exit 1
fi
touch "$marker"
