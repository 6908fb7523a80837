# make demo: set up and run the main job. make test: set up and pass the tests. make lint: style and types. make docs: site/.
# make neighbours: also install the packages that tests/neighbours/ stand next to, as CI does.
# make soak, make fuzz: what docs/reliability.md reports, half an hour and an hour.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
DEMO := runs/demo
# docs/results.md says why these: the same as its table's rows, with their settings chosen on validation images.
TRAIN := --epochs 30 --batch-size 64 --attack.epsilon 0.25 --eval.val-images 287 --optim.lr 0.1 --optim.warmup 8 --diagnostics

.PHONY: demo test lint docs soak fuzz setup neighbours clean
setup: $(VENV)/.installed

# torch goes first: whatever depends on it would otherwise choose its own build.
$(VENV)/.installed: pyproject.toml constraints.txt tools/install_ffcv.sh tools/install_chromium.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastarat needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	sh tools/install_ffcv.sh $(BIN)/python
	sh tools/install_chromium.sh
	touch $@

neighbours: $(VENV)/.neighbours

# Makes the mark itself, as the last thing. 600 MB that most people do not need.
$(VENV)/.neighbours: $(VENV)/.installed tools/install_neighbours.sh
	sh tools/install_neighbours.sh $(BIN)/python

# One thread: networks this small gain little from two, and two starve each other when the machine is busy.
demo: export OMP_NUM_THREADS = 1
demo: setup
	rm -rf $(DEMO)
	$(BIN)/fastarat train --defense standard $(TRAIN) --out $(DEMO)/standard
	$(BIN)/fastarat train --defense at $(TRAIN) --out $(DEMO)/at
	$(BIN)/fastarat train --defense ar-at --defense.center clean --defense.gamma 5 $(TRAIN) --out $(DEMO)/ar-at
	for run in standard at ar-at; do \
		$(BIN)/fastarat eval $(DEMO)/$$run --attack clean,pgd-20,autoattack --curves > $(DEMO)/$$run.txt || exit; \
	done
	cd $(DEMO) && { cat standard.txt; echo; cat at.txt; echo; cat ar-at.txt; } > printed.txt
	$(BIN)/fastarat report $(DEMO)/standard $(DEMO)/at $(DEMO)/ar-at --out $(DEMO)/report
	@echo; cat $(DEMO)/printed.txt
	@echo; echo "pictures: $(DEMO)/report/curves.png $(DEMO)/report/examples.png; all of it: $(DEMO)/report/report.html"

# Two single-threaded workers: the tests' tensors are small. FASTARAT_STRICT turns a skip that should not be into a failure.
test: setup $(if $(CI),neighbours)
	OMP_NUM_THREADS=1 FASTARAT_STRICT=1 FASTARAT_REQUIRE_FFCV=$$(test -f $(VENV)/.ffcv -o -n "$$CI" && echo 1) \
		FASTARAT_REQUIRE_NEIGHBOURS=$$(test -f $(VENV)/.neighbours && echo 1) \
		$(BIN)/python -m pytest -q -n 2 --durations=5

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright

docs: setup
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

soak: export OMP_NUM_THREADS = 1
soak: setup
	$(BIN)/python tools/soak.py --minutes 30 --out docs/results/soak.json

# Guided by coverage where atheris installs (it has no wheel for every Python), by the errors' texts otherwise.
fuzz: export OMP_NUM_THREADS = 1
fuzz: setup
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tools/fuzz.py --minutes 10 --out runs/fuzz --json docs/results/fuzz.json

clean:
	rm -rf $(VENV) build dist site *.egg-info $(DEMO)
