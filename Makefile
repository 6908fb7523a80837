# make demo: set up and run the main job. make test: set up and pass the tests. make lint: style only.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
DEMO := runs/demo
EPSILON := 0.15

.PHONY: demo test lint setup clean
setup: $(VENV)/.installed

# torch goes first: whatever depends on it would otherwise choose its own build.
$(VENV)/.installed: pyproject.toml constraints.txt tools/install_ffcv.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastarat needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	sh tools/install_ffcv.sh $(BIN)/python
	touch $@

# One thread: networks this small gain little from two, and two starve each other when the machine is busy.
demo: export OMP_NUM_THREADS = 1
demo: setup
	rm -rf $(DEMO)
	$(BIN)/fastarat train --defense standard --epochs 20 --batch-size 64 --attack.epsilon $(EPSILON) --out $(DEMO)/standard
	$(BIN)/fastarat train --defense ar-at --epochs 25 --batch-size 64 --attack.epsilon $(EPSILON) --out $(DEMO)/ar-at
	$(BIN)/fastarat eval $(DEMO)/standard --attack clean,pgd-20,autoattack --limit 200 > $(DEMO)/printed.txt
	echo >> $(DEMO)/printed.txt
	$(BIN)/fastarat eval $(DEMO)/ar-at --attack clean,pgd-20,autoattack --limit 200 >> $(DEMO)/printed.txt
	$(BIN)/fastarat report $(DEMO)/standard $(DEMO)/ar-at --out $(DEMO)/report
	@echo; cat $(DEMO)/printed.txt
	@echo; echo "pictures: $(DEMO)/report/curves.png $(DEMO)/report/examples.png; all of it: $(DEMO)/report/report.html"

# Two single-threaded workers: the tests' tensors are small. FASTARAT_STRICT turns a skip that should not be into a failure.
test: setup
	OMP_NUM_THREADS=1 FASTARAT_STRICT=1 FASTARAT_REQUIRE_FFCV=$$(test -f $(VENV)/.ffcv -o -n "$$CI" && echo 1) \
		$(BIN)/python -m pytest -q -n 2 --durations=5

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO)
