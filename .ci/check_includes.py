#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks every #include against the dependency direction: arrows point down, never up.

  check_includes.py FILE...    paths from the repository root
"""
import os
import re
import sys

# What the model runtime may use of core beside the public API: helpers, and the process's one pool.
HELPERS = ("core/tensor.hpp", "core/scalar.hpp", "core/check.hpp", "core/env.hpp",
           "core/thread_pool.hpp")
ANY = ("msa/", "core/", "dispatch/", "reference/", "cpu/", "cuda/", "kv_cache/", "c_api/",
       "model/", "tools/", "tests/", "bench/")

# Folder -> the project headers that its files may include beside those of their own folder. The
# longest matching folder counts.
ALLOWED = {
    "include/msa": ("msa/",),
    "src/core": ("msa/",),
    "src/reference": ("msa/", "core/"),
    "src/cpu": ("msa/", "core/"),
    "src/cuda": ("msa/", "core/"),
    "src/cuda/common": ("msa/", "core/"),
    "src/cuda/generic": ("msa/", "core/", "cuda/common/", "cuda/cuda.hpp"),
    "src/cuda/sm90": ("msa/", "core/", "cuda/common/", "cuda/cuda.hpp"),
    "src/kv_cache": ("msa/", "core/"),
    "src/dispatch": ("msa/", "core/", "reference/", "cpu/", "cuda/"),
    "src/c_api": ("msa/", "core/"),
    "src/model": ("msa/", "core/thread_pool.hpp") + HELPERS,  # one pool for all of a program
    "python/src": ("msa/",),
    "tools": ANY,
    "examples": ("msa/",),
    "tests/install": ("msa/",),
    "tests": ANY,
    "bench": ANY,
}

# Other people's headers -> the folders that may include them.
EXTERNAL = [
    (r"hwy/", ("src/cpu", "tests/cpu")),
    (r"cuda[A-Za-z0-9_]*\.h|cuda/|cooperative_groups|nv",
     ("src/cuda", "tests/cuda", "tests/support", "bench", "examples")),
    (r"nanobind/", ("python/src",)),
    (r"nlohmann/", ("src/model", "tools", "tests", "bench")),
    (r"CLI/", ("tools", "bench")),
    (r"pcre2\.h", ("src/model",)),
    (r"dnnl|oneapi/dnnl/", ("src/model", "bench")),
    (r"cblas\.h", ("bench",)),
    (r"gtest/|gmock/", ("tests",)),
    (r"benchmark/", ("bench",)),
    (r"sys/mman\.h", ("src/core", "src/model", "tests", "bench")),  # madvise in core::HostBuffer
    (r"malloc\.h", ("tests",)),  # glibc's mallinfo2()
    # POSIX
    (r"sys/|fcntl\.h|unistd\.h|signal\.h|dirent\.h|dlfcn\.h", ("src/model", "tools", "tests", "bench")),
]
C_STANDARD = {"stddef.h", "stdint.h", "stdio.h", "stdlib.h", "string.h", "math.h", "float.h", "limits.h"}

INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)')


def rule_for(path, table):
    folders = [folder for folder in table if path.startswith(folder + "/")]
    return max(folders, key=len, default=None)


def resolve(path, name):
    """The repository file that an include names, or None."""
    for base in (os.path.dirname(path), "include", "src", "."):
        candidate = os.path.normpath(os.path.join(base, name))
        if os.path.isfile(candidate):
            return candidate
    return None


def problem_with(path, folder, quoted, name):
    target = resolve(path, name)
    if target is not None:
        if target.startswith(folder + "/"):
            return None
        logical = re.sub(r"^(include|src)/", "", target)
        if any(logical == item or item.endswith("/") and logical.startswith(item)
               for item in ALLOWED[folder]):
            return None
        return f"{folder} may not use {logical}"
    for pattern, folders in EXTERNAL:
        if re.match(pattern, name):
            if any(path.startswith(allowed + "/") for allowed in folders):
                return None
            return f"{name} belongs to {', '.join(folders)}"
    if quoted:
        return f"no such file: {name}"
    if "." not in name and "/" not in name:
        return None  # C++ standard library
    if name in C_STANDARD and path.endswith((".h", ".c")):
        return None
    return f"unknown header {name}: name it in .ci/check_includes.py with the folders that may use it"


def main():
    failures = 0
    for path in sys.argv[1:]:
        folder = rule_for(path, ALLOWED)
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                if folder is None:
                    problem = "this folder has no rule in .ci/check_includes.py"
                else:
                    problem = problem_with(path, folder, match[1] is not None, match[1] or match[2])
                if problem:
                    print(f"{path}:{number}: {problem}")
                    failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
