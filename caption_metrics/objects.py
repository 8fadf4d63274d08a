"""Which object classes a caption names: words of a table, in the singular and the plural, the longest match first.

Corresponds to `caption_to_words` of Rohrbach et al. (EMNLP 2018; LisaAnne/Hallucination), with its rules for pairs of
words. What differs: plurals are made from the table, in place of singulars that the package pattern makes from the
words of captions (its "bu" of "bus" and "ty" of "ties" name nothing there); every name of several words is found, not
only those of a list of pairs, and with hyphens too. Tokens are the Penn Treebank tokenizer's; no name reaches across
punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .captions import Caption
from .coco_objects import COCO_OBJECTS, OTHER_MEANINGS
from .tokenizer import PTBTokenizer

# Pairs of words and what the paper reads them as: "a baby elephant" and "a passenger jet" name no person.
READ_AS: dict[str, str] = {
    f"{qualifier} {word}": word
    for qualifiers, words in (
        ("adult baby", "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"),
        ("passenger", "jet train"),
    )
    for qualifier in qualifiers.split()
    for word in words.split()
} | {"toilet seat": "toilet", "home plate": "", "train track": ""}

_PUNCTUATION = re.compile(r"""[,.;:!?()"]+(?=\s|$)|(?<=\s)[("]""")
_IRREGULAR = {
    "child": ("children",),
    "fisherman": ("fishermen",),
    "foot": ("feet",),
    "goose": ("geese",),
    "louse": ("lice",),
    "man": ("men",),
    "mouse": ("mice",),
    "ox": ("oxen",),
    "person": ("people", "persons"),
    "tooth": ("teeth",),
} | {word: (f"{word}s",) for word in ("caiman", "doberman", "german", "human", "ottoman", "shaman")}


def plurals(word: str) -> tuple[str, ...]:
    """The usual plural forms of an English noun; of several words the last one changes."""
    first, space, last = word.rpartition(" ")
    return tuple(f"{first}{space}{plural}" for plural in _plurals(last))


def _plurals(word: str) -> tuple[str, ...]:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("man", "mouse")):
        return tuple(word[: -len(end)] + _IRREGULAR[end][0] for end in ("man", "mouse") if word.endswith(end))
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return (f"{word[:-1]}ies",)
    if word.endswith("o"):
        return f"{word}s", f"{word}es"
    if word.endswith("fe"):
        return f"{word[:-2]}ves", f"{word}s"
    if word.endswith("f"):
        return f"{word[:-1]}ves", f"{word}s"
    return (f"{word}s",)


class ObjectWords:
    """Object classes and the words that name them.

    synonyms: words by class; a class's own name is one of its words. Default: `COCO_OBJECTS`.
    other_meanings: phrases, and the word that each is read as ("" for none), beside those of the paper. Default:
        those of `COCO_OBJECTS` for that table, none for others.
    """

    def __init__(
        self, synonyms: Mapping[str, Sequence[str]] = COCO_OBJECTS, other_meanings: Mapping[str, str] | None = None
    ):
        self.synonyms = {name: tuple(words) for name, words in synonyms.items()}
        if other_meanings is None:
            other_meanings = OTHER_MEANINGS if synonyms is COCO_OBJECTS else {}
        self.other_meanings = dict(other_meanings)
        self._tokenizer = PTBTokenizer()
        # Tokens to the class that they name, or to None where they name no object.
        self._phrases: dict[tuple[str, ...], str | None] = {}
        for name, words in self.synonyms.items():
            for word in (name, *words):
                self._phrases[tuple(self._tokenizer.tokenize(word))] = name
        for name, words in self.synonyms.items():
            for word in (name, *words):
                self._add(word, name)
        for phrase, word in (self.other_meanings | READ_AS).items():
            self._add(phrase, self.class_of(word))
        self._phrases.pop((), None)
        self._longest = max(map(len, self._phrases), default=1)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.synonyms)

    def _add(self, phrase: str, name: str | None) -> None:
        """Adds a phrase, its plural, and both with hyphens, but for those that are words of the table."""
        for form in (phrase, *plurals(phrase)):
            words = tuple(self._tokenizer.tokenize(form))
            self._phrases.setdefault(words, name)
            self._phrases.setdefault(("-".join(words),), name)

    def class_of(self, name: str) -> str | None:
        """The class that a name or a synonym, such as a category of an annotation file, belongs to."""
        return self._phrases.get(tuple(self._tokenizer.tokenize(name)))

    def of_categories(self, categories: Iterable[str]) -> ObjectWords:
        """Words of the categories of an annotation file alone; a category that has no words here has its own name.

        What a file does not annotate cannot be told from what is not in the image.
        """
        names = {category: self.class_of(category) or category for category in categories}
        return ObjectWords({name: self.synonyms.get(name, ()) for name in names.values()}, self.other_meanings)

    def mentions(self, caption: Caption) -> list[tuple[str, str]]:
        """Words and classes of the objects that a caption names, a string or a list of tokens, in its order."""
        if isinstance(caption, str):
            clauses = [self._tokenizer.tokenize(clause) for clause in _PUNCTUATION.split(caption)]
        else:
            clauses = [list(caption)]
        found = [match for tokens in clauses for match in self._matches(tokens)]
        # The seat of a toilet is no chair.
        if any(word in ("toilet", "toilets") for tokens in clauses for word in tokens):
            found = [(words, name) for words, name in found if words not in ("seat", "seats")]
        return found

    def _matches(self, tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
        start = 0
        while start < len(tokens):
            for length in range(min(self._longest, len(tokens) - start), 0, -1):
                words = tuple(tokens[start : start + length])
                if words in self._phrases:
                    name = self._phrases[words]
                    if name is not None:
                        yield " ".join(words), name
                    start += length
                    break
            else:
                start += 1
