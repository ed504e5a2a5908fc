# make lab      fine-tune a real language model: the whole lab, headless        (results: build/lab/)
# make course   open the course in JupyterLab
# make test     every test: linters, pytest over tests/, nbval over notebooks/solutions/; two processes at a time
# make slides   render the decks to HTML and PDF                               (build/slides/; needs Node.js)
# make notebooks  for authors: derive the learners' notebooks from notebooks/solutions/
# make bench    speed beside rival stacks, 40 to 80 minutes on two cores; ROWS="train classify" for some (results: build/bench/)
#
# PYTHON=python3.12          another Python (3.10 or newer)
# TORCH_INDEX=URL            where to take torch from, for the small CPU build on Linux; see README.md

PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
INSTALLED := .venv/.installed

.PHONY: lab course test slides notebooks bench clean

lab: $(INSTALLED)
	$(BIN)/python -m labkit lab

course: $(INSTALLED)
	$(BIN)/python -m jupyter lab notebooks/00_start_here.ipynb

test: $(INSTALLED)
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -p tests.conftest notebooks/solutions --numprocesses 2 --dist loadfile

slides:
	$(PYTHON) slides/render.py

notebooks: $(INSTALLED)
	$(BIN)/python notebooks/build.py

bench: $(INSTALLED)
	$(BIN)/python -m tests.bench $(ROWS)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('labkit needs Python 3.10 or newer, this is %s. Name another: make PYTHON=python3.12' % sys.version.split()[0])"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url $(TORCH_INDEX) $(firstword $(shell grep ^torch== requirements.txt)))
	$(BIN)/python -m pip install --no-compile -r requirements.txt
	@$(BIN)/python -c "open('$(INSTALLED)', 'w').close()"

clean:
	rm -rf .venv build
