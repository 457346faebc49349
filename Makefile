# tentacle.py needs Python 3.8 or later and nothing else; the tests need pytest, which `make test`
# puts into .venv where it is missing.

PYTHON ?= python3
TEST_PYTHON = $(shell $(PYTHON) -c 'import pytest' 2>/dev/null && echo $(PYTHON) || echo .venv/bin/python)

.PHONY: help demo test bench lint clean

help:
	@echo 'make demo    an agent and a dispatcher on this machine, in seconds'
	@echo 'make test    the whole suite'
	@echo 'make bench   the benchmarks, each beside a baseline (two minutes)'
	@echo 'make lint    syntax, line lengths, unused names (ruff, in .venv)'
	@echo 'make clean   remove what these have made'

demo:
	$(PYTHON) tentacle.py demo

.venv/bin/pytest:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check pytest

# The longest tests run beside the others, and are shown when both are done.
LONG = any_way or cron_life or serve_that_is_killed or gigabytes or hundred or outlive or install or \
	demo or long_call or has_answered or one_was_seen or serve_and_poll or second_listening or random_kills or process_1
PYTEST = $(TEST_PYTHON) -m pytest -q -o faulthandler_timeout=200 -p no:cacheprovider test_tentacle.py

test: $(if $(filter .venv/bin/python,$(TEST_PYTHON)),.venv/bin/pytest)
	@long=$$(mktemp); $(PYTEST) -k '$(LONG)' > $$long 2>&1 & beside=$$!; \
	$(PYTEST) -k 'not ($(LONG))'; failed=$$?; \
	wait $$beside || failed=1; cat $$long; rm -f $$long; exit $$failed

bench: $(if $(filter .venv/bin/python,$(TEST_PYTHON)),.venv/bin/pytest)
	$(TEST_PYTHON) test_tentacle.py

lint:
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	test -x .venv/bin/ruff || .venv/bin/python -m pip install --quiet ruff
	.venv/bin/ruff check --isolated --no-cache --target-version py38 --line-length 100 \
		--select E,F,W --ignore E402,E731 tentacle.py test_tentacle.py

clean:
	rm -rf .venv __pycache__ .pytest_cache
