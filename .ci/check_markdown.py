#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that what Markdown files name exists.

  check_markdown.py FILE...             links, paths in `code`, make targets, presets
  check_markdown.py --blocks LANGUAGE FOLDER FILE...
                                        writes each fenced block marked "LANGUAGE test" to FOLDER
"""
import json
import os
import re
import sys

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"^\.?[\w.-]+(?:/[\w.-]+)*/?$")
# Files without a slash that Markdown may name in code.
FILE = re.compile(r"^(?:[A-Z][\w-]*\.(?:md|json|txt)|Makefile|\.[\w-]+)$")


def fenced_blocks(text):
    """(info string, first line number, body) of each fenced block, and the text without them."""
    blocks, rest, block = [], [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"^\s*```(.*)$", line)
        if fence and block is None:
            block = (fence[1].strip(), number + 1, [])
            rest.append("")
        elif fence:
            blocks.append((block[0], block[1], "\n".join(block[2]) + "\n"))
            block = None
            rest.append("")
        elif block is not None:
            block[2].append(line)
            rest.append("")
        else:
            rest.append(line)
    return blocks, rest


def check_path(document, name):
    """None, or what is wrong with a path written in `code`."""
    if not PATH.match(name) or name.startswith("build/"):
        return None
    first = name.split("/")[0]
    if "/" in name and os.path.isdir(first) or FILE.match(name):
        if not os.path.exists(name):
            return f"no such path: {name}"
    return None


def check_command(line, targets, presets):
    for target in re.findall(r"\bmake((?: +[a-z]+)+)", line):
        for word in target.split():
            if word not in targets:
                return f"no make target {word}"
    for preset in re.findall(r"--preset[ =](\S+)", line):
        if preset not in presets:
            return f"no preset {preset}"
    word = line.split()[0] if line.split() else ""
    if "/" in word and not word.startswith("build/") and not os.path.exists(word):
        return f"no such command: {word}"
    return None


def check(documents):
    with open("Makefile", encoding="utf-8") as file:
        targets = set(re.findall(r"^([a-z]+):", file.read(), re.M))
    with open("CMakePresets.json", encoding="utf-8") as file:
        presets = {p["name"] for kind in json.load(file).values() if isinstance(kind, list)
                   for p in kind if isinstance(p, dict) and not p.get("hidden")}
    failures = 0
    for document in documents:
        with open(document, encoding="utf-8") as file:
            blocks, lines = fenced_blocks(file.read())
        problems = []
        for number, line in enumerate(lines, 1):
            for target in LINK.findall(line):
                path = os.path.join(os.path.dirname(document), target)
                if "://" not in target and not os.path.exists(path):
                    problems.append((number, f"no such link target: {target}"))
            for name in CODE.findall(line):
                problems.append((number, check_path(document, name)))
                if re.match(r"(make|cmake) ", name):
                    problems.append((number, check_command(name, targets, presets)))
        for info, first, body in blocks:
            if info.split()[:1] == ["sh"]:
                for number, line in enumerate(body.splitlines(), first):
                    problems.append((number, check_command(line, targets, presets)))
        for number, problem in problems:
            if problem:
                print(f"{document}:{number}: {problem}")
                failures += 1
    return 1 if failures else 0


def write_blocks(language, folder, documents):
    count = 0
    for document in documents:
        with open(document, encoding="utf-8") as file:
            blocks, _ = fenced_blocks(file.read())
        for info, first, body in blocks:
            if info.split() == [language, "test"]:
                stem = document.replace("/", "_").removesuffix(".md")
                with open(f"{folder}/{stem}_{first}.{language}", "w", encoding="utf-8") as file:
                    file.write(body)
                count += 1
    print(f"{count} {language} blocks")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--blocks"]:
        sys.exit(write_blocks(sys.argv[2], sys.argv[3], sys.argv[4:]))
    sys.exit(check(sys.argv[1:]))
