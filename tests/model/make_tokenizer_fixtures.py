#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes fixtures/tokenizer/: what tokenizer_test.cpp compares our tokenizer with.

  base.json      a byte-level BPE tokenizer whose merges cross words, lines and digits, so that every
                 difference in pre-tokenization changes the ids
  gaps.json      one whose vocabulary lacks most bytes
  texts.json     a multilingual text and random short strings
  variants.json  changes to base.json or gaps.json (members of the top level and of "model" that are
                 replaced), with the ids that the `tokenizers` package gives: written out for the
                 pre-tokenizers of well-known model families, else as hashes
  decode.json    random lists of ids and their texts

Run with Python 3.11 (Unicode 14) and tokenizers 0.23.3; the versions used are kept in texts.json.
Another Unicode version of Python gives other random strings. Deterministic otherwise.
"""

import json
import pathlib
import random
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
OUT = HERE / "fixtures" / "tokenizer"

LINES = [
    "The library reads a long document, block by block, and keeps only what matters.\n",
    "It's what we've said; they'll say I'M WRONG, you'd agree, and SHE'LL see. DON'T you'Re 'Tis\n",
    "Größenwahn? Nein: ein übermäßig langer Straßenname ärgert Jürgen.\n",
    "Où êtes-vous allés cet été ? Ça va, l'œuvre naïve coûte 1 234,56 €.\n",
    "El niño comió piñas; ¿cuántas? ¡Más de 12.345.678!\n",
    "Быстрая проверка: ёлка, подъезд и 42 кошки на крыше.\n",
    "Η γρήγορη αλεπού πηδάει πάνω από τον τεμπέλη σκύλο· ναι;\n",
    "שלום עולם, זה טקסט מימין לשמאל עם ניקוד: שָׁלוֹם 2024.\n",
    "هذا نصٌّ عربيٌّ فيه تشكيلٌ وأرقام ١٢٣٤٥٦٧ وعلامة؟ نعم،\u200f تمامًا.\n",
    "यह हिन्दी का एक छोटा वाक्य है, संख्या १२३४५ के साथ।\n",
    "এই বাক্যটি বাংলায় লেখা, যুক্তাক্ষর ক্ষ ও জ্ঞ সহ।\n",
    "இது தமிழில் ஒரு சிறிய வாக்கியம் ஆகும்.\n",
    "นี่คือประโยคภาษาไทยที่ไม่มีช่องว่าง เลข ๑๒๓๔\n",
    "这是一个没有空格的中文句子，包含标点符号。数字１２３和二〇二六年！\n",
    "これは日本語のテストです。カタカナ、ひらがな、漢字、ﾊﾝｶｸ、々も。\n",
    "안녕하세요, 이것은 한국어 문장입니다. 조합형: \u1112\u1161\u11ab\u1100\u1173\u11af\n",
    "ეს ქართული წინადადებაა. Սա հայերեն նախադասություն է։ ይህ አማርኛ ነው።\n",
    "Emoji: 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 ❤️ 1️⃣ ☃ 🧑🏿‍🚀!!!\n",
    "Combining: e\u0301 o\u0308\u0304 n\u0303 Z\u0351\u036b\u0343a\u0363\u0342lgo \u0301lone, ǅ ŉ ſ K Å ﬁ ﬆ İ ı ß ẞ\n",
    "x² + y³ ≠ ½·∑∞ ± √2 → ⌊π⌋ ⅷ Ⅻ ①②③ ৳ ₿ ¼ ª º\n",
    "def f(x_1: int, *args) -> str:\n\tif x_1 >= 0x1F and not args:\n\t\treturn f\"{x_1:>10}\\n\"  # why?\n",
    "#include <vector>\r\nint main() {\r\n    std::vector<int> v{1,2,3};\r\n\r\n\r\n    return v[0]/*c*/;\r\n}\r\n",
    "tabs\tand  two   three    four     spaces     \n\n\n   \n \t \n end of run   ",
    "\u00a0nbsp\u00a0\u00a0x\u2003em\u2028line\u2029para\u3000wide\u1680ogham\u180evowel\u0085next\u200bzero\ufeffbom\n",
    "controls \x00\x01\x07\x08\x0b\x0c\x1b[0m\x7f\x80\x9f end\r\r\n\n\r",
    "digits 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 007 1e-10 v2.0.1\n",
    "urls https://example.org/a//b?c=d&e=f#g and a_b-c.d@e.f/../g\\h 'quoted' \"double\" `tick`\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n",
    "camelCaseWords HTTPServerError XMLHttpRequest iPhone McDonald's O'NEILL'S\n",
    "]~!b[]~b]user\nhi[e~[\n]~b]ai\n<mm:think>well</mm:think>]<]minimax[>[<tool_call> <tool_call>]<]\n",
    " <a> <a><b>x<a><b <a>\t word words (word) sword  the them ing\r\n \r\n 12 123 12\u00a0 [e~[  ]~b]   é éñ x  x y x",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐍈𐌰𐌿 𓀀𓁐 𠮷野家 \U0010fffd \ue000 \ufffd\n",
    "no newline at the end",
]

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*stages):
    return {"type": "Sequence", "pretokenizers": [*stages, BYTE_LEVEL]}


def added(content, number, special=False, **flags):
    entry = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    return {**entry, "normalized": False, "special": special, **flags}


def template(before, after):
    def part(token):
        return {"SpecialToken": {"id": token, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in before + after}
    return {
        "type": "TemplateProcessing",
        "single": [part(t) for t, _ in before] + [text] + [part(t) for t, _ in after],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": ids,
    }


def train_base(text):
    """Merges run over everything but line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[^\n]{1,24}\n*|\n+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return json.loads(tokenizer.to_str())


def train_gaps(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([text], trainer)
    return json.loads(tokenizer.to_str())


def random_strings(count, generator):
    assigned = [
        chr(c)
        for c in range(0x110000)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    by_kind = {}
    for c in assigned:
        by_kind.setdefault(unicodedata.category(c), []).append(c)
    spaces = [c for c in assigned if c.isspace()] + ["\u180e", "\u200b", "\ufeff"]
    scraps = ["'s", "'S", "'Re", "'LL", "'\u017f", " '", "]~b]", "[e~[", "<a>", "<a><b>", "<a", " x", "\r\n", "\n", "  "]
    scraps += ["]~!", "word", "ing", " the", "12", "/", "!=", "don't", "👩‍👩‍👧", "e\u0301", "漢字", "שָׁ", "ß", "ſ", "K"]
    sources = [
        lambda: generator.choice(scraps),
        lambda: generator.choice(spaces) * generator.randint(1, 3),
        lambda: generator.choice(by_kind[generator.choice(sorted(by_kind))]),
        lambda: chr(generator.randint(0x20, 0x7E)),
        lambda: chr(generator.randint(0x00, 0x2FF)),
        lambda: generator.choice("aAbBzZ") * generator.randint(1, 4),
        lambda: str(generator.randint(0, 99999)),
    ]
    strings = []
    for _ in range(count):
        strings.append("".join(generator.choice(sources)() for _ in range(generator.randint(1, 9))))
    return strings


def variants(base, gaps):
    """(name, file, members to replace, whether the ids are written out)"""
    n = len(base["model"]["vocab"])
    legacy = [" ".join(pair) for pair in base["model"]["merges"]]
    m_tokens = ["]~!b[", "]~b]", "[e~[", "]<]minimax[>[", "<mm:think>", "</mm:think>"]
    m_added = [added(t, n + i, special=i < 4) for i, t in enumerate(m_tokens)] + [added("<tool_call>", n + 6)]
    bos, eos = ("<|begin|>", n), ("<|end|>", n + 1)
    begin_end = [added(*bos, special=True), added(*eos, special=True)]
    byte_level_post = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    vocab = base["model"]["vocab"]
    flags = [
        ("<a>", {}),
        ("<a><b>", {"normalized": True}),
        ("<a><b", {}),
        ("word", {"single_word": True}),
        ("ing", {"single_word": True, "normalized": True}),
        ("[e~[", {"special": True, "lstrip": True}),
        ("]~b]", {"special": True, "rstrip": True}),
        (" x", {"lstrip": True, "rstrip": True}),
        ("\r\n", {"normalized": True, "rstrip": True}),
        ("12", {"lstrip": True, "single_word": True}),
        ("éñ", {"normalized": True}),  # decodes as two bytes
        ("é", {}),  # in the vocabulary, as the stand-in for a byte
        ("the", {"single_word": True}),
    ]
    new = [content for content, _ in flags if content not in vocab]
    flags = [added(c, vocab.get(c, n + (new.index(c) if c in new else 0)), **f) for c, f in flags]
    yield "minimax", "base", {
        "added_tokens": m_added,
        "pre_tokenizer": sequence(split(O200K)),
        "post_processor": template([("]~!b[", n)], []),
    }, True
    yield "gpt2", "base", {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"merges": legacy},
    }, True
    yield "gpt2_prefix_space", "base", {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "added_tokens": begin_end,
        "post_processor": byte_level_post,
    }, False
    yield "llama3", "base", {
        "pre_tokenizer": sequence(split(LLAMA3)),
        "model": {"ignore_merges": True},
        "added_tokens": begin_end,
        "post_processor": {"type": "Sequence", "processors": [byte_level_post, template([bos], [])]},
    }, True
    yield "cl100k", "base", {
        "pre_tokenizer": sequence(split(CL100K)),
        "added_tokens": begin_end,
        "post_processor": template([bos], [eos]),
    }, True
    yield "qwen", "base", {
        "pre_tokenizer": sequence(split(QWEN)),
        "normalizer": {"type": "Sequence", "normalizers": []},
    }, True
    yield "deepseek", "base", {
        "pre_tokenizer": sequence(
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"),
            {"type": "Digits", "individual_digits": True},
        ),
    }, True
    yield "no_split", "base", {"pre_tokenizer": BYTE_LEVEL}, False
    yield "no_split_prefix_space", "base", {
        "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True},
        "added_tokens": flags,
    }, False
    yield "added_token_flags", "base", {"pre_tokenizer": sequence(split(O200K)), "added_tokens": flags}, False
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            name = f"{behavior}{'_inverted' if invert else ''}"
            yield f"regex_{name}", "base", {"pre_tokenizer": sequence(split(r"\p{Lu}|\s|[0-9]{2}", behavior, invert))}, False
            yield f"string_{name}", "base", {"pre_tokenizer": sequence(split(" ", behavior, invert, "String"))}, False
    yield "string_special_characters", "base", {"pre_tokenizer": sequence(split("]~b", "Isolated", False, "String"), split(".", kind="String"))}, False
    yield "digits_contiguous", "base", {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False})}, False
    yield "whitespace", "base", {"pre_tokenizer": sequence({"type": "Whitespace"})}, False
    yield "whitespace_split", "base", {"pre_tokenizer": sequence({"type": "WhitespaceSplit"})}, False
    yield "nested_sequence", "base", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Sequence", "pretokenizers": [split(r"\p{L}+"), {"type": "Sequence", "pretokenizers": []}]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    ]}}, False
    yield "ignore_merges", "base", {"pre_tokenizer": sequence(split(r"\s+")), "model": {"ignore_merges": True, "merges": base["model"]["merges"][:300]}}, False
    patterns = {
        "interval_plus": r"\p{N}{1,2}+|\p{Ll}{2}+",
        "interval_question": r"[a-z]{3}?|\d{1,2}?",
        "interval_open": r"[a-z]{,2}|A{2,}|\s{2,3}",
        "literal_brace": r"a{b|x{|\{|}",
        "dot": r"(?m:e.)|.\z",
        "caseless_start": r"(?i)s+|k",
        "anchors": r"^.|.$|\A\s|\s\Z|\z",
        "hex_digits": r"\h+|\H\H",
        "word": r"\w+|\W",
        "word_in_class": r"[\w'\-]+|[^\w\s]",
        "word_boundary": r"\b\w+\b|\B.",
        "space": r"\s|\S\S",
        "space_in_class": r"[\s,]+|[\S]{1,2}",
        "posix": r"[[:punct:]]+|[[:digit:][:space:]]{2}|[[:upper:]]+|[[:xdigit:]_]|[^[:punct:]a-y]",
        "categories": r"\p{Lu}\p{Ll}*|\p{Lt}|\p{Lm}+|\p{M}+|\p{Nd}+|\p{Nl}|\p{No}|\p{Pd}|\p{Sc}|\p{Zs}|\p{Cf}",
        "negated_categories": r"\P{L}+|\p{^N}",
        "scripts": r"\p{Han}+|\p{Hiragana}+|\p{Katakana}+|\p{Hangul}+|\p{Cyrillic}+|\p{Greek}+|\p{Arabic}+|\p{Hebrew}+|\p{Thai}+",
        "escapes": r"\t|\v|\f|\e|\a|\x41|\x{4e00}|\u3042|\'|\/|\-",
        "lookaround": r"(?<=[a-z])(?=[A-Z])|(?<!\d)\d{2}(?!\d)|\d(?=\d{3})",
        "empty_matches": r"b*|",
        "backreference": r"(\w)\1",
        "named_backreference": r"(?<x>[.!?a-f])\k<x>",
        "atomic": r"(?>a+)b|\p{L}*+\d|(?:\s+)?+[,.]",
        "newlines": r"\R|\N{3}",
        "any": r"\O\O",
        "keep": r"\s\K\w+",
        "caseless_group": r"(?i:[a-c]|the|ı|İ|σ|å)+",
        "bracket_first": r"[]a]+|[^]b]{2}",
        "comment": r"a(?#first letter)b|c",
    }
    for name, pattern in patterns.items():
        yield f"pattern_{name}", "base", {"pre_tokenizer": sequence(split(pattern))}, False
    yield "gaps", "gaps", {}, False
    yield "gaps_unk", "gaps", {"model": {"unk_token": "<unk>"}}, False
    yield "gaps_fuse_unk", "gaps", {"model": {"unk_token": "<unk>", "fuse_unk": True}}, False


def changed(file, changes):
    result = {**file, **changes}
    result["model"] = {**file["model"], **changes.get("model", {})}
    return result


def hash_ids(ids):
    """FNV-1a over the ids as 32-bit words; enough bits to notice, few enough to keep the files small."""
    value = 0x811C9DC5
    for number in ids:
        value = ((value ^ number) * 0x01000193) & 0xFFFFFFFF
        value ^= value >> 15
    return f"{value:08x}"


SEPARATOR = 0xFFFFFFFF  # between the strings of one hash


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def write(name, value):
    """Lists get one line for each element."""

    def compact(part):
        return json.dumps(part, ensure_ascii=False, separators=(",", ":"))

    def lines(part):
        return "[\n" + ",\n".join(map(compact, part)) + "\n]" if isinstance(part, list) else compact(part)

    if isinstance(value, dict):
        text = "{\n" + ",\n".join(f"{compact(key)}:{lines(part)}" for key, part in value.items()) + "\n}"
    else:
        text = lines(value)
    path = OUT / name
    path.write_text(text + "\n", encoding="utf-8", newline="")
    print(f"{path.relative_to(HERE)}: {path.stat().st_size} bytes")


def main():
    print(f"tokenizers {tokenizers.__version__}, Unicode {unicodedata.unidata_version}")
    generator = random.Random(20260602)
    OUT.mkdir(parents=True, exist_ok=True)
    text = "".join(LINES)
    base, gaps = train_base("".join(line for line in LINES if "]~b]" not in line) * 3), train_gaps("some plain text with few letters, its words are few")
    strings = random_strings(1500, generator)
    write("base.json", base)
    write("gaps.json", gaps)
    write("texts.json", {
        "tokenizers_version": tokenizers.__version__,
        "unicode_version": unicodedata.unidata_version,
        "text": text,
        "lines": LINES,
        "strings": strings,
    })

    rows = []
    for name, file, changes, in_full in variants(base, gaps):
        tokenizer = Tokenizer.from_str(json.dumps(changed({"base": base, "gaps": gaps}[file], changes)))
        for token in changes.get("added_tokens", []):
            assert tokenizer.token_to_id(token["content"]) == token["id"], token
        row = {"name": name, "file": file, "changes": changes}

        def ids_of(string, special=False):
            return tokenizer.encode(string, add_special_tokens=special).ids

        ids = ids_of(text)
        row["text"] = ids if in_full else hash_ids(ids)
        row["lines"] = " ".join(hash_ids(ids_of(line)) for line in LINES)
        row["special"] = ids_of("a b", special=True)
        row["strings_per_hash"] = 1 if in_full else 10
        row["strings"] = " ".join(
            hash_ids([n for string in group for n in [*ids_of(string), SEPARATOR]])
            for group in chunks(strings, row["strings_per_hash"])
        )
        row["decoded"] = tokenizer.decode(ids, skip_special_tokens=False) == text
        rows.append(row)
        print(f"  {name}: {len(ids)} ids, round trip {row['decoded']}")
    write("variants.json", rows)

    flags = next(row for row in rows if row["name"] == "added_token_flags")
    tokenizer = Tokenizer.from_str(json.dumps(changed(base, flags["changes"])))
    size = tokenizer.get_vocab_size() + 3  # some ids without a token
    lists = []
    for _ in range(300):
        ids = [generator.randrange(size if generator.random() < 0.5 else 256) for _ in range(generator.randint(0, 12))]
        ids += [size - 4 - generator.randrange(7)] * generator.randint(0, 1)
        lists.append([ids, tokenizer.decode(ids, skip_special_tokens=False), tokenizer.decode(ids, skip_special_tokens=True)])
    write("decode.json", {"variant": flags["name"], "cases": lists})
    return 0


if __name__ == "__main__":
    sys.exit(main())
