# SPDX-License-Identifier: Apache-2.0
# The two doors for newcomers; contributors use the CMake presets directly (CONTRIBUTING.md).
MODEL ?= examples/mini_m3
TOKENS ?= 32768

# CMake reads this variable; empty means no launcher.
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: help run test clean
help:
	@echo 'make run    install what is missing, build, and ask for a fact at the beginning of a long document, with'
	@echo '            sparse, then with dense attention'
	@echo '            (TOKENS=8192 for a shorter one, MODEL=folder for another checkpoint)'
	@echo 'make test   install what is missing, build everything, run the tests'
	@echo 'make clean  remove build/'

run:
	@sh cmake/bootstrap.sh
	@cmake --preset release
	@cmake --build --preset release --target tools/msa
	@sh cmake/document.sh build/release/document.txt
	build/release/tools/msa run --model '$(MODEL)' --prompt-file src/core/check.hpp --max-tokens 48
	@sh cmake/planted_fact.sh build/release/document.txt $(TOKENS) memory window build/release/prompt.txt
	@tail -n 1 build/release/prompt.txt | sed 's/^/the prompt ends with: /'; echo
	build/release/tools/msa run --model '$(MODEL)' --prompt-file build/release/prompt.txt \
	  --max-tokens 3 --attention both >build/release/answer.txt
	@cat build/release/answer.txt
ifeq ($(MODEL),examples/mini_m3)
	@sed '/^msa attention/q' build/release/answer.txt | grep -q '^ window' || \
	  { echo 'make run: the planted fact "memory window" was not retrieved' >&2; exit 1; }
endif

test:
	@sh cmake/bootstrap.sh
	@cmake --workflow --preset release

clean:
	rm -rf build
