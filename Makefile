# make quickstart   the whole recipe at toy size on a CPU: a table and a picture in out/quickstart/
# make test         all tests (what CI runs)
# make bench        kernels and training steps beside their peers
# make lint
.PHONY: setup quickstart test bench lint peers clean

PYTHON ?= python3
# one thread per process: two threads on two busy cores are many times slower than one
export OMP_NUM_THREADS ?= 1

setup: .venv/ready
.venv/ready: requirements.txt requirements-test.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

peers: .venv/peers
.venv/peers: .venv/ready requirements-peers.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	touch $@

quickstart: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/quickstart.sh

test: .venv/ready
	.venv/bin/python -m pytest -n 2 --durations=10

bench: .venv/peers
	.venv/bin/python bench.py

lint: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check ruff
	.venv/bin/ruff check .

clean:
	rm -rf out
