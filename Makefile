# SPDX-License-Identifier: Apache-2.0
# The two doors for newcomers; contributors use the CMake presets directly (CONTRIBUTING.md).
MODEL ?= examples/tiny_m3
TOKENS ?= 32768

# CMake reads this variable; empty means no launcher.
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: help run test clean
help:
	@echo 'make run    install what is missing, build, and read a long document with sparse, then dense attention'
	@echo '            (TOKENS=8192 for a shorter one, MODEL=folder for another checkpoint)'
	@echo 'make test   install what is missing, build everything, run the tests'
	@echo 'make clean  remove build/'

run:
	@sh cmake/bootstrap.sh
	@cmake --preset release
	@cmake --build --preset release --target tools/msa
	@sh cmake/document.sh build/release/document.txt
	build/release/tools/msa run --model '$(MODEL)' --prompt-file build/release/document.txt \
	  --max-prompt-tokens $(TOKENS) --max-tokens 32 --attention both

test:
	@sh cmake/bootstrap.sh
	@cmake --workflow --preset release

clean:
	rm -rf build
