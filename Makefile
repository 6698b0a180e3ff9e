# Each target sets up its own .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := wandistiller tools benchmarks $(wildcard *.py)

.PHONY: demo playground test test-all lint format audit clean

demo: $(VENV)/.installed
	$(BIN)/python train_distillation.py --output_dir outputs/demo
	$(BIN)/python evaluate_student.py --student outputs/demo --prompts_file data/demo_heldout_prompts.txt \
		--num_prompts 100 --batch_size 50 --judge tools/demo_judge.py:judge_all

playground: $(VENV)/.installed-playground
	$(BIN)/python playground.py

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -r $(SOURCES) -ll
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-playground: $(VENV)/.installed
	$(BIN)/pip install -q -r requirements.txt "gradio>=6"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# Needs a network; the tools live in a folder of their own, so that they are not audited themselves.
audit: $(VENV)/.installed
	test -x $(VENV)-audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install -q pip-audit==2.10.1 pip-licenses==5.5.5 bandit==1.9.4
	$(VENV)-audit/bin/bandit -q -r $(SOURCES) -ll
	$(VENV)-audit/bin/pip-licenses --python $(BIN)/python
	$(VENV)-audit/bin/pip-audit --progress-spinner off --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

clean:
	rm -rf $(VENV) $(VENV)-audit .pytest_cache .ruff_cache .mypy_cache
