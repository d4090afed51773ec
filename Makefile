# Everything a newcomer types; `make help` lists it. PYTHON, TORCH and VENV may be given on the command line.
PYTHON ?= python3
# the version that the tests run with; any from 2.11 on will do
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# two files of tests at a time, each in one process, which compiles what its tests share; in the order of their names,
# in which short ones come last
PYTEST := $(BIN)/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder
# of `make sanitize`; without a seed it draws one and prints it
CONFIGURATIONS ?= 300
SEED ?=
export OMP_WAIT_POLICY ?= passive

.PHONY: help train test lint format bench sanitize cuda-check gpu-check build env clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

train: build ## meta-train on the paper's sinusoid experiment, with a table, a speed line and a picture
	$(BIN)/mtml-fast train --out runs/sinusoid

test: build ## prove it: all tests
	$(PYTEST)

lint: $(VENV)/installed ## check style and formatting of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/installed ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: build ## time the operators against PyTorch, and whoever else is there, on one thread
	$(BIN)/python -m benchmarks.run --threads 1

# the C++ core alone, without Python: random calls in every form, on threads and for every instruction set
CXX ?= g++
SANITIZED := $(wildcard csrc/isa/*.cpp csrc/gradients.cpp csrc/heads.cpp csrc/mlp_adapt*.cpp)
FUZZ := $(wildcard tests/native/*_fuzz.cpp)
sanitize: ## run random calls of the core and of the CUDA kernels under the address, undefined-behaviour and thread sanitizers
	@mkdir -p build/sanitize
	@for kind in address,undefined thread; do \
	  flags="-std=c++17 -O1 -g -ffp-contract=fast -fno-math-errno -Wno-psabi -fsanitize=$$kind -fno-sanitize-recover=all"; \
	  flags="$$flags -D_GLIBCXX_SANITIZE_VECTOR -Icsrc"; \
	  printf '%s\n' $(SANITIZED) $(FUZZ) | \
	    xargs -P 2 -I{} sh -c "$(CXX) $$flags -c {} -o build/sanitize/\$$(basename {}).o" || exit 1; \
	  for program in $(notdir $(FUZZ:.cpp=)); do \
	    $(CXX) $$flags $(patsubst %,build/sanitize/%.o,$(notdir $(SANITIZED))) build/sanitize/$$program.cpp.o \
	      -pthread -o build/sanitize/$$program && \
	    echo "sanitize: $$kind, $$program" && build/sanitize/$$program $(CONFIGURATIONS) $(SEED) || exit 1; \
	  done; \
	  for op in $(basename $(notdir $(wildcard csrc/cuda/*.cu))); do \
	    $(CXX) $$flags -Itests/native/cuda_shim -rdynamic -x c++ csrc/cuda/$$op.cu tests/native/$${op}_cuda.cpp \
	      -ldl -o build/sanitize/cuda && \
	    echo "sanitize: $$kind, $$op on CUDA" && build/sanitize/cuda $(CONFIGURATIONS) $(SEED) || exit 1; \
	  done; \
	done

# UPDATE=1 writes the table of what the CUDA kernels take of a GPU anew
UPDATE ?=
cuda-check: build ## prove the CUDA and Triton kernels without a GPU: compiled, and run on the CPU
	@$(if $(UPDATE),$(BIN)/python -m tests.cuda.resources)
	@$(PYTEST) tests/cuda tests/ops/test_triton.py

# on a machine that need not have more than Python, torch with CUDA and nvcc: no environment, no network. OUT=folder for
# what it writes
OUT ?=
gpu-check: ## prove and time everything on a GPU, in under ten minutes, with the Python that is there
	@$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT))

build: $(VENV)/installed ## compile what has changed in csrc
	@$(BIN)/python setup.py -q build_ext --inplace

env: build ## print what runs here and who serves each operator
	$(BIN)/python -m mtml_fast.env

clean: ## remove the virtual environment and all that was built
	rm -rf $(VENV) build *.egg-info mtml_fast/*.so

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q '$(TORCH)' numpy 'setuptools>=77' 'pybind11>=2.13' ninja
	$(BIN)/pip install -q --no-build-isolation -e '.[train,test]'
	@touch $@
