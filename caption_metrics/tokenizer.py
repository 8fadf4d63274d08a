"""The Penn Treebank tokenizer of the captioning tools, without Java.

Equals `pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer` (Stanford CoreNLP 3.4.1 with `-preserveLines -lowerCase`,
then 17 punctuation tokens dropped), with one difference: each caption is tokenized on its own. In a batch, Java's
result for the last word of a caption can depend on the first word of the next one, and a line separator inside of a
caption shifts all captions that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from .characters import representatives
from .ptb_rules import RULES, SPLIT_WORDS

# The list is in upper case and the text is lower case by then: "-lrb-" and its like stay, as they do in the original.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Java ends its lines at these; a caption is one line.
_LINE_SEPARATORS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))
# Half a character can't be written as UTF-8, so Java never sees one; like U+FFFD it is no token.
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

_COMPILED = tuple((rule, re.compile(rule.pattern, re.DOTALL), re.compile(f"[{rule.starts}]")) for rule in RULES)
_BARREN = {rule.name: re.compile(rule.barren) for rule in RULES if rule.barren}
_NEEDS = tuple({rule.needs for rule in RULES if rule.needs})

# Most captions are letters and spaces, perhaps with a period at the end: the rules for that in one expression each.
_PLAIN_CAPTION = re.compile(r"[A-Za-z ]*(?:(?<=[A-Za-z]{2})\. *)?")
_PLAIN_WORD = re.compile(r" *([A-Za-z]+)(?= |\Z)")


@lru_cache(maxsize=4096)
def _rules_for(
    character: str, missing: frozenset[tuple[str, ...]]
) -> tuple[tuple[Callable, Callable, int, re.Pattern | None], ...]:
    """The rules that can apply where `character` stands, in a text without the strings that are `missing`."""
    return tuple(
        (pattern.match, rule.becomes, rule.resume, _BARREN.get(rule.name))
        for rule, pattern, starts in _COMPILED
        if starts.match(character) and rule.needs not in missing
    )


def _lex(text: str) -> list[str]:
    """Tokens of a text without line separators: at each place the rule that reaches furthest, of equals the first."""
    kinds = representatives(text)
    lower = kinds.lower()
    missing = frozenset(needs for needs in _NEEDS if not any(string in lower for string in needs))
    tokens: list[str] = []
    barren_until: dict[Callable, int] = {}
    position, end = 0, len(text)
    while position < end:
        plain = _PLAIN_WORD.match(kinds, position)
        if plain is not None and plain[1].lower() not in SPLIT_WORDS:
            tokens.append(plain[1].lower())
            position = plain.end()
            continue
        reach = -1
        for match, becomes, resume, barren in _rules_for(kinds[position], missing):
            if barren is not None and barren_until.get(match, 0) > position:
                continue
            found = match(kinds, position)
            if found is None:
                if barren is not None and (run := barren.match(kinds, position)) is not None:
                    barren_until[match] = run.end()
            elif found.end() > reach:
                reach, token_end, make, read_again = found.end(), found.end(1), becomes, resume
        # Every character is either a symbol or a space, so one rule at least has matched.
        token = make(text[position:token_end])
        if token:
            tokens.append(token.lower())
        position = token_end - read_again
    # Few tokens hold a space themselves; the original splits its output line at spaces, so they fall apart there.
    return " ".join(tokens).rstrip().split(" ")


@lru_cache(maxsize=20_000)
def _last_word(word: str) -> tuple[str, ...]:
    return tuple(_lex(word))


class PTBTokenizer:
    """Penn Treebank tokens of captions, in lower case and without punctuation.

    >>> PTBTokenizer().tokenize("A man's T.V. isn't on, Mr. Smith said.")
    ['a', 'man', "'s", 't.v.', 'is', "n't", 'on', 'mr.', 'smith', 'said']
    """

    def tokenize(self, caption: str) -> list[str]:
        """Tokens of one caption. Line separators count as spaces; an empty caption has no tokens.

        Raises ValueError if `caption` is not a string.
        """
        if not isinstance(caption, str):
            raise ValueError(f"a caption must be a string, not {type(caption).__name__}: {caption!r:.80}")
        if _PLAIN_CAPTION.fullmatch(caption):
            words = caption.lower().split()
            last: tuple[str, ...] = ()
            if words and words[-1].endswith("."):
                words.pop()
                # Whether the last word is an abbreviation depends on its case.
                last = _last_word(caption.split()[-1])
            if SPLIT_WORDS.isdisjoint(words):
                return [*words, *(token for token in last if token not in PUNCTUATION)]
        text = _LONE_SURROGATES.sub("\ufffd", caption.translate(_LINE_SEPARATORS))
        return [token for token in _lex(text) if token and token not in PUNCTUATION]

    def tokenize_batch(self, captions: Iterable[str]) -> list[list[str]]:
        """Tokens of every caption: the same as `tokenize` for each."""
        if isinstance(captions, str):
            raise ValueError("tokenize_batch takes a list of captions; for one caption call tokenize")
        return [self.tokenize(caption) for caption in captions]
