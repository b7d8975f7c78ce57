# A fresh machine needs two commands: make demo, make test. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test coverage test-slow quality style docs wheel clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python recipes/demo.py

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

coverage: .venv/installed
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal --cov

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file .docs/mkdocs.yml
	@echo 'The site is in build/docs.'

wheel: .venv/installed
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache
