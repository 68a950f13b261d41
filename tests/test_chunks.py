"""tokenize_chunks and the fast byte-pair encoding below it, with the real CLIP vocabulary."""

import random
import re
import time
import unicodedata
from itertools import chain
from sys import maxunicode

import pytest
import seams
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import handler

ANY = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SPACE = "".join(c for c in map(chr, range(maxunicode)) if c in "\t\n\r" or unicodedata.category(c)[0] == "Z")
SCRIPTS = [
    *("a photo of", "1girl,solo,long_hair", "don't they'll we've I'D", "don’t", "Ünïcödé", "tiếng Việt", "naïve café,"),
    *("日本語の、テキスト。", "漢字", "한국어", "ภาษาไทย", "العربية", "עברית", "हिन्दी", "ΑΣ ὈΔΥΣΣΕΎΣ", "İstanbul"),
    *("🎉", "👨‍👩‍👧‍👦", "🇩🇪", "1️⃣", "❤️", "!!!", "?!", "...", "…", "(((", ":-)", "#1", "3.14", "1,000", "½", "Ⅷ", "—"),
    *(
        "<|endoftext|>",
        "<|startoftext|>x",
        "<|ENDOFTEXT|>",
        "\x00",
        "\u200b",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "\x85",
        "\x1c",
    ),
    *(
        "\n\t",
        "\u3000",
        "\u2028",
        "\u0301",
        "e\u0301",
        "BREAK",
        "(a:1.2)",
        "pneumonoultramicroscopicsilicovolcanoconiosis",
    ),
]


@pytest.fixture(scope="module")
def tokenizers(world):
    """SDXL's two, which differ in their padding token."""
    return [transformers.CLIPTokenizer.from_pretrained(world.config / name) for name in ("tokenizer", "tokenizer_2")]


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers[0]


@pytest.fixture(scope="module")
def fast_tokenizer(world):
    return transformers.CLIPTokenizerFast.from_pretrained(world.config / "tokenizer")


def own_ids(tokenizer, text):
    """A text's ids, as the tokenizer itself gives them."""
    return tokenizer(text, add_special_tokens=False).input_ids


def keeps_ids(tokenizer, field, max_tokens):
    """Whether a text without spaces can be cut with no change of ids: no word of it is longer than a chunk.

    Not where its reading depends on what is further away: Σ is σ or ς in lower case by the letters around it, and
    accents are composed across control characters, which CLIP drops.
    """
    tokens = tokenizer.tokenize(field)
    if len(tokens) <= max_tokens:
        return True
    sizes = [0]
    for token in tokens:
        sizes[-1] += 1
        if token.endswith("</w>") or token in tokenizer.all_special_tokens:
            sizes.append(0)
    return max(sizes) <= max_tokens and not any(c == "Σ" or unicodedata.category(c)[0] == "C" for c in field)


def assert_promise(tokenizer, prompt, max_tokens):
    """Every chunk fits, nothing is lost or doubled, no word is cut that is not longer than a chunk."""
    chunks = handler.tokenize_chunks(tokenizer, prompt, max_tokens)
    ids = [own_ids(tokenizer, chunk) for chunk in chunks]
    longest_character = max((len(own_ids(tokenizer, c)) for c in prompt), default=0)
    assert all(0 < len(chunk) <= max(max_tokens, longest_character) for chunk in ids), [len(chunk) for chunk in ids]
    if all(keeps_ids(tokenizer, field, max_tokens) for field in re.split(f"[{SPACE}]", prompt)):
        assert list(chain(*ids)) == own_ids(tokenizer, prompt)
    assert squeeze("".join(chunks)) == squeeze(prompt) or not own_ids(tokenizer, prompt)


def squeeze(text):
    """Without the white space that chunks lose at their ends."""
    return re.sub(f"[{SPACE}]", "", text)


texts = st.one_of(
    st.text(max_size=200),
    st.text(st.characters(categories=["L", "M"]), max_size=200),
    st.lists(st.sampled_from(SCRIPTS), max_size=60).map(" ".join),
    st.lists(st.sampled_from(SCRIPTS), max_size=60).map("".join),
    st.lists(st.one_of(st.sampled_from([*SCRIPTS, " ", ", ", "."]), st.text(max_size=8)), max_size=60).map("".join),
)


@ANY
@given(prompt=texts, max_tokens=st.one_of(st.just(75), st.integers(4, 75)), second=st.booleans())
@example(prompt="<|endoftext|>" * 90, max_tokens=75, second=False)
@example(prompt=unicodedata.normalize("NFD", "é.") * 100, max_tokens=75, second=False)
@example(prompt="ohehmomd", max_tokens=4, second=False)
@example(prompt="!" * 200, max_tokens=75, second=True)
@example(prompt="!AÙĂAĈ", max_tokens=8, second=True)
@example(prompt="0\u0300\ufe20👧👧👧👧👧👧\ufe20", max_tokens=12, second=False)
def test_promise_for_any_text(tokenizers, prompt, max_tokens, second):
    """Of any Unicode text the chunks hold every token once, in order, and at most max_tokens each."""
    assert_promise(tokenizers[second], prompt, max_tokens)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("separator", [" ", "", ", "])
def test_promise_for_each_script(tokenizer, script, separator):
    """Prompts of several chunks keep the promise in every script, spaced or not."""
    assert_promise(tokenizer, separator.join([script] * 120), 75)


@ANY
@given(prompt=texts)
def test_promise_with_the_fast_tokenizer(fast_tokenizer, prompt):
    """CLIPTokenizerFast, whose ids differ for some scripts, is served as well."""
    assert_promise(fast_tokenizer, prompt, 75)


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [
        ("", []),
        (" \n\u200b", []),
        ("cat", [1]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 160, [75, 75, 10]),
        ("cat " * 59 + "dog, " + "cat " * 100, [61, 75, 25]),
        ("cat " * 53 + "dog, " + "cat " * 100, [75, 75, 5]),  # the comma is the 21st from the end
        ("cat " * 54 + "dog, " + "cat " * 100, [56, 75, 25]),  # the 20th
        ("cat " * 60 + "dog. " + "cat " * 100, [62, 75, 25]),
        ("cat " * 60 + 'dog!" ' + "cat " * 100, [62, 75, 25]),
        ("cat " * 60 + "1,000 " + "cat " * 100, [75, 75, 15]),  # no comma between words
        ("cat,dog," * 60, [74, 74, 74, 18]),
        ("cat " * 58 + "dog, " + "cat " * 14 + "x-" * 35, [74, 70]),  # what follows the comma would not fit
        ("猫" * 20 + "。" + "猫" * 30, [61, 75, 15]),
    ],
)
def test_where_cuts_are(tokenizer, prompt, sizes):
    """Chunks are filled, but for a comma or sentence end in their last 20 tokens."""
    assert [len(own_ids(tokenizer, chunk)) for chunk in handler.tokenize_chunks(tokenizer, prompt)] == sizes


def test_long_word_is_cut_between_characters(tokenizer):
    """A word longer than a chunk loses no character, and its neighbours keep their ids."""
    word = "".join(random.Random(0).choices("abcdefgh", k=900))
    chunks = handler.tokenize_chunks(tokenizer, f"a cat {word} a dog")
    assert "".join(chunks).replace(" ", "") == f"acat{word}adog"
    assert chunks[0].startswith("a cat ") and chunks[-1].endswith(" a dog")
    assert sum(len(own_ids(tokenizer, chunk)) for chunk in chunks) < len(own_ids(tokenizer, f"a cat {word} a dog")) + 60


def test_lone_surrogates(tokenizer):
    """A lone surrogate, which CLIP's tokenizer chokes on, becomes U+FFFD, which it ignores."""
    assert handler.tokenize_chunks(tokenizer, "a \ud800 cat\udfff") == ["a \ufffd cat\ufffd"]


def test_max_tokens_is_checked(tokenizer):
    """A chunk of no token cannot be."""
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        handler.tokenize_chunks(tokenizer, "a cat", 0)


@ANY
@given(st.text(st.sampled_from("aabbcdeéü漢🎉😂!?.'"), min_size=1, max_size=120))
@example("a" * 300)
def test_merges_as_the_slow_tokenizer(tokenizer, word):
    """The byte-pair encoding in n log n gives the slow tokenizer's own tokens."""
    ((piece,),) = seams.job_chunks([tokenizer], word, "truncate")
    assert piece.tokens[0] == tokenizer.tokenize(word)


@pytest.mark.parametrize(
    "prompt",
    [
        "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=10_000)),
        "x" * 10_000,
        "🎉😂" * 5_000,
        "!" * 10_000,
        "," * 10_000,
        "\u200b " * 5_000,
        "(a)" * 3_333,
        "e\u0301" * 5_000,
        "a" + "\u0301\u0323" * 5_000,
        "".join(map(chr, range(0x4E00, 0x4E00 + 10_000))),
        "a photo of a cat, " * 555,
    ],
    ids=["letters", "x", "emoji", "!", "comma", "zero-width", "brackets", "accents", "stacked", "chinese", "words"],
)
def test_ten_thousand_characters_in_a_second(tokenizers, prompt):
    """10,000 characters are cut in a second or two of CPU, by tokenize_chunks and by a job, with both tokenizers."""
    started = time.process_time()
    handler.tokenize_chunks(tokenizers[0], prompt)
    between = time.process_time()
    seams.job_chunks(tokenizers, prompt, "blend")
    assert between - started < 2 and time.process_time() - between < 2


def test_ignored_characters_at_the_end_stay(pipe):
    """What CLIP ignores stays in the last chunk's text: the pieces of a long word, joined, are the word."""
    word = "\u2d5b\u03c7" * 3 + "\U000ba908"
    assert "".join(handler.tokenize_chunks(pipe.tokenizer, word, 1)) == word
