# ruff: noqa: RUF001 (these characters are what the file is about)
"""The tokenizer gives the tokens of Stanford CoreNLP 3.4.1 as pycocoevalcap runs it."""

import gzip
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_metrics import PTBTokenizer
from caption_metrics.ptb_rules import RULES

GOLDEN = Path(__file__).parent / "golden" / "metrics"
tokenizer = PTBTokenizer()


def golden(name):
    with gzip.open(GOLDEN / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("name", "rows"), [("ptb_real", 3000), ("ptb_synthetic", 994), ("ptb_decoded", 505)])
def test_golden_captions(name, rows):
    captions = golden(name)
    assert len(captions) == rows
    different = [row["id"] for row in captions if tokenizer.tokenize(row["raw"]) != row["tokens"]]
    assert different == []


# What the rules are for, one case each; the tokens are Java's.
CASES = {
    "A man's dog isn't here.": "a man 's dog is n't here",
    "it’s the girls' ma'am": "it 's the girls ma'am",
    "they 're here , is n't it 's": "they 're here is n't it 's",
    "it 're": "it re",
    "cannot gonna Gimme 'tis": "can not gon na gim me 't is",
    "rock 'n' roll in the '90s": "rock 'n' roll in the '90s",
    "C'mon y'all, o'clock": "c'mon y' all o'clock",
    "Mr. Smith of St. Louis, Mo.": "mr. smith of st. louis mo.",
    "a Wii U. A man": "a wii u a man",
    "a Wii U. a man": "a wii u. a man",
    "in the U.S. The end": "in the u.s. the end",
    "art. 5 of the art.": "art. 5 of the art",
    "Pa. and pa. and a Co. Ltd": "pa. and pa and a co. ltd",
    "road.The end": "road.the end",
    "at 10:30 a.m., 5ft. tall": "at 10:30 a.m. 5ft tall",
    "1,000.50 of 1/2 or 10 1/2 and 2½": "1,000.50 of 1/2 or 10\xa01/2 and 2 1/2",
    "call (555) 123-4567": "call -lrb-555-rrb-\xa0123-4567",
    "$5 or 5¢ or £5 or US$5": "$ 5 or 5 cents or # 5 or us$ 5",
    "AT&T, R&amp;B and b&w": "at&t r&b and b & w",
    "x-ray, T-shirt, 4-way and well-known": "x-ray t-shirt 4-way and well-known",
    "and/or w/o w/ it": "and/or w/o w / it",
    "www.foo.com, http://a.b/c?d=e. foo.net/x": "www.foo.com http://a.b/c?d=e foo.net / x",
    "me@mail.com #fun @you #1": "me@mail.com #fun @you # 1",
    "photo.jpg and C++ or F#": "photo.jpg and c++ or f#",
    "<unk> and <a href='x'> or < 3": "<unk> and <a\xa0href='x'> or < 3",
    "(a) [b] {c}": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-",
    ":-) and :) and ^_^ :D": ":--rrb- and :-rrb- and ^_^ d",
    "wait... what?! no!!! - -- --- -----": "wait what ?! no !!! -----",
    "“a” «b» „c‟ 'd' \"e\"": "a b „ c ‟ 'd e",
    "cliché café&eacute; naïve": "cliché café&eacute; naïve",
    "a 😀 b\u200bc d\x01e": "a b c d e",
    "soft\xadhyphen \xad": "softhyphen",
    "İ ΣΑΣ ẞ": "i̇ σας ß",
    "# * ** ~ | ^ = + % & @ _ °": "# * ** ~ | ^ = + % & @ _ °",
    "": "",
    " . , ! ": "",
}


@pytest.mark.parametrize("caption", CASES)
def test_cases_of_the_rules(caption):
    assert " ".join(tokenizer.tokenize(caption)) == CASES[caption]


SEPARATORS = ["\r\n", *"\n\r\v\f\x85\u2028\u2029\x1c\x1e"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_separator_separates_words_and_nothing_else(separator):
    captions = [f"a dog{separator}on grass", "a cat"]
    assert tokenizer.tokenize_batch(captions) == [["a", "dog", "on", "grass"], ["a", "cat"]]


@pytest.mark.parametrize("surrogate", [chr(0xD800), chr(0xDFFF), f"a{chr(0xD83D)} b"])
def test_a_lone_surrogate_is_no_token(surrogate):
    assert set(tokenizer.tokenize(surrogate)) <= {"a", "b"}


@pytest.mark.parametrize("caption", [None, 3, b"a dog", ["a dog"], float("nan")])
def test_what_is_no_string_is_refused(caption):
    with pytest.raises(ValueError, match="must be a string, not"):
        tokenizer.tokenize(caption)


def test_a_string_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="list of captions"):
        tokenizer.tokenize_batch("a dog")


# Pieces that meet the rules, joined without mercy.
PIECES = (
    "a The man dog's isn 't n't ' '' ` \" “ ” ’ . .. ... , ; : ! ? - -- — _ / \\ | & &amp; &lt; < > <b> </b> ( ) [ ] "
    "{ } # @ * ~ ^ = + % $ € ½ 1 12 1,5 1/2 555 a.m. U.S. Inc. No. Mr. X. co www. .com http:// a@b.c é ß 日 ٠ ٫ \xad "
    "\xa0 \x85 \u200b \u2028 😀 \ud800 \x00 \n"
)
pieces = st.sampled_from(PIECES.split(" "))
captions = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(pieces, st.just(" ")), max_size=20).map("".join),
    st.text(" .'-a1A", max_size=20),
)


@given(st.lists(captions, max_size=6))
@settings(deadline=None, max_examples=150)
def test_a_batch_is_its_captions(batch):
    assert tokenizer.tokenize_batch(batch) == [tokenizer.tokenize(caption) for caption in batch]


@given(captions)
@settings(deadline=None, max_examples=200)
def test_tokens_hold_no_line_separator_space_or_capital(caption):
    for token in tokenizer.tokenize(caption):
        assert token
        assert not re.search("[ \n\r\v\f\u2028\u2029]", token)
        assert token == token.lower()


@given(captions)
@settings(deadline=None, max_examples=200)
def test_a_rule_starts_where_it_says(caption):
    """`Rule.starts` and `Rule.needs` save time and nothing else."""
    from caption_metrics.characters import representatives

    kinds = representatives(caption)
    for rule in RULES:
        for position in range(len(kinds)):
            if re.compile(rule.pattern, re.DOTALL).match(kinds, position):
                assert re.match(f"[{rule.starts}]", kinds[position]), rule.name
                assert not rule.needs or any(string in kinds.lower() for string in rule.needs), rule.name


@pytest.mark.parametrize(
    ("piece", "tokens"),
    [
        ("word ", 200_000),
        ("a", 1),
        ("!", 1),
        ("a.", 1),
        ("😀", 0),
        pytest.param("(", 1_000_000, marks=pytest.mark.slow),
        pytest.param("1 ", 500_000, marks=pytest.mark.slow),
        pytest.param("<b ", 666_666, marks=pytest.mark.slow),
    ],
)
def test_a_caption_of_a_megabyte(piece, tokens):
    start = time.perf_counter()
    assert len(tokenizer.tokenize(piece * (1_000_000 // len(piece)))) == tokens
    assert time.perf_counter() - start < 30


def test_a_run_that_ends_unlike_any_rule_is_not_scanned_from_each_of_its_characters():
    """Quadratic time would make this an hour; see `Rule.barren`."""
    assert tokenizer.tokenize("a," * 200_000 + "-") == ["a"] * 200_000
