# ruff: noqa: RUF001 (these characters are what the file is about)
"""The rules of the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, for captions.

Each rule is a regular expression with a name and the case that it is for. As in the lexer generator that CoreNLP
uses, all rules are tried where a token may start; the one whose match *and* look-ahead reach furthest wins, and of
equals the one listed first. Group 1 is the token, what follows it in the expression is look-ahead.

The expressions run over `characters.representatives(text)`: "ä" stands for any letter outside ASCII, "\u0301" for any
combining mark, "٠" for any digit outside ASCII and so on. Spelt-out words ignore case, character classes do not.
NOTICE, beside this file, says how the rules were found; README.md, how they were checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


# ------------------------------------------------------------------------------------------ what becomes of a token
def _as_it_is(text: str) -> str:
    return text


def _dropped(text: str) -> str:
    return ""


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\xad", "") or "-"


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _one_word(text: str) -> str:
    """A token that holds spaces gets no-break spaces for them, so that tokens can be joined by spaces."""
    return text.replace(" ", "\xa0")


def _parentheses(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCIES = {"¢": "cents", "£": "#", "\x80": "$", "¤": "$", "₠": "$", "€": "$"}
_BRACKETS = {"[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-", "(": "-LRB-", ")": "-RRB-"}


# Quotation marks as LaTeX writes them: these tell their side by themselves; others than these stay.
_SIDED_QUOTES = {
    **dict.fromkeys("\x91‘‛‹", "`"),
    **dict.fromkeys("\x92’›", "'"),
    **dict.fromkeys("\x93“«", "``"),
    **dict.fromkeys("\x94”»", "''"),
}
_LEFT_QUOTES = str.maketrans({**_SIDED_QUOTES, "'": "`", '"': "``"})
_RIGHT_QUOTES = str.maketrans({**_SIDED_QUOTES, '"': "''"})


def _left_quotes(text: str) -> str:
    return text.replace("&apos;", "'").replace("&quot;", '"').translate(_LEFT_QUOTES)


def _right_quotes(text: str) -> str:
    return text.replace("&apos;", "'").replace("&quot;", '"').translate(_RIGHT_QUOTES)


@dataclass(frozen=True)
class Rule:
    """A kind of token.

    `starts`: the characters that it can start with, as a character class. `becomes`: what is made of group 1; an empty
    string is no token. `needs`: a text without one of these strings (lower case) can't match, which saves long texts
    from being scanned in vain. `resume`: how many characters of the token are read again for the next token.
    `barren`: characters of which a failed match says that no match starts before their run is over; without it a long
    run would be scanned anew from each of its characters.
    """

    name: str
    pattern: str
    starts: str
    becomes: Callable[[str], str] = _as_it_is
    needs: tuple[str, ...] = ()
    resume: int = 0
    barren: str = ""


# ---------------------------------------------------------------------------------------------- kinds of characters
LETTERS = "A-Za-zäÄſıİ\u212a"  # letters proper
WORD_LETTERS = LETTERS + "\u0301\xad"  # and marks and soft hyphens
DIGITS = "0-9٠"
UPPER = "[A-ZÄİ\u212aⒶⅠ]"
SPACE = "[ \t\x85\xa0\u2000]"
ENTITY_LETTER = "&[aeiouAEIOU](?i:acute|grave|uml);"  # caf&eacute;
APOSTROPHE = "(?:['’]|(?i:&apos;))"
ANY_APOSTROPHE = "(?:['’`‘]|(?i:&apos;))"
AMPERSAND = "(?i:&amp;)"
HYPHEN = "[-_‐]"
PAUSE = "[,;:、]"
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
TAG = (
    rf"<(?:[!?][A-Za-z-][^>\r\n]*|/{_NAME} *"
    rf"|{_NAME}(?: +{_NAME}(?: *= *(?:'[^'\r\n]*'|\"[^\"\r\n]*\"))?)*(?: */)? *)>"
)

# ------------------------------------------------------------------------------------------------------------- words
_FIRST = f"(?:[{WORD_LETTERS}]|{ENTITY_LETTER})"
_REST = f"[{WORD_LETTERS}{DIGITS}]*(?:{ENTITY_LETTER}[{WORD_LETTERS}{DIGITS}]*)*"
WORD = f"{_FIRST}{_REST}(?:[.!?]{_FIRST}{_REST})*"
CONTRACTION = f"{APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
NEGATION = f"[nN]{ANY_APOSTROPHE}[tT]"
_PLAIN = f"[{LETTERS}{DIGITS}]+"
_ELIDED = f"(?:[dDoOlL]{ANY_APOSTROPHE}[{LETTERS}{DIGITS}])?"
COMPOUND = f"{_ELIDED}{_PLAIN}(?:{HYPHEN}{_ELIDED}{_PLAIN})*"
ACRONYM = r"(?:(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r))|[A-Za-z](?:\.[A-Za-z])+)"
DOTTED_COMPOUND = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{ACRONYM}\.|[A-Za-z0-9\xad]+))+"
_NO_DOTTED_COMPOUND = r"[A-Za-z0-9.,\xad]+"
AMPERSAND_WORD = f"[A-Z]+(?:(?:{AMPERSAND}|[+&])[A-Z]+)+"
SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
# ----------------------------------------------------------------------------------------------- numbers, addresses
NUMBER = f"(?:[{DIGITS}]*(?:[.:,\xad٫][{DIGITS}]+)+|[{DIGITS}]+)"
PHONE = (
    r"(?:(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})"
)
FILE_ENDING = (
    "(?i:bat|bmp|cgi|class|cpp|c|dll|docx|doc|exe|gif|gz|html|htm|h|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|"
    "py|sql|tar|txt|wav|xml|x|zip)"
)
_FILE_PART = f"(?:[{WORD_LETTERS}{DIGITS}]|{ENTITY_LETTER})+"
FILE = rf"{_FILE_PART}(?:\.{_FILE_PART})*\.{FILE_ENDING}"
_PATH = r'/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]'
_WWW = r'(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}'
# Between the dots of a host without "www", capitals, digits and "-" are excluded: an accident of the original, kept.
_HOST = r"""(?:[^ \t\n\f\r"`'<>|!(){}$,-_]+\.)+(?i:com|net|org|edu)"""
_MAIL = r'[a-zA-Z0-9][^ \t\n\f\r"<>|()\xa0{}]*@(?:[^ \t\n\f\r"<>|(){}.\xa0]+\.)*[^ \t\n\f\r"<>|(){}.\xa0]+'

_NO_MAIL = r'[a-zA-Z0-9][^ \t\n\f\r"<>|()\xa0{}]*'

# ----------------------------------------------------------------------------------------------------- abbreviations
# May end a sentence: before a capital and at the end of the text, the period is read again as the sentence's own.
CLOSING_ABBREVIATION = (
    "(?:(?i:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri"  # months, days
    "|ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?"
    "|wyo|inc|cos?|corp|pp?t(?-i:[ey])s?|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys"  # states, firms
    "|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\\.d|blvd|rd|esq|etc|al|seq|bldg)|A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash))\\."
)
# Never end a sentence, except before one of SENTENCE_WORDS: titles, initials, acronyms.
OPEN_ABBREVIATION = (
    "(?i:mr|mrs|ms|mlle|mme|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?"
    "|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|msgr|mt|mtg|mfg|natl|adj|adv|assoc|asst|atty|dept|elec|ens|ft"
    "|insp|invt|sfc|ph|vs|alex|wm|jos|cie|a\\.k\\.a|cf|treas)\\."
)
INITIALS = f"(?:{ACRONYM}|[A-Za-z])\\."
NUMBER_ABBREVIATION = "(?i:ca|figs?|prop|nos?|art|bldg|pp|op)\\."
SENTENCE_WORDS = (
    "(?:A(?i:bout|ccording|dditionally|fter|n|s|t)?|B(?i:ut)|E(?i:arlier)|H(?i:e|er|ere|owever)|I(?i:[fnt])|L(?i:ast)"
    "|M(?i:any|ore)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|o|ome|uch)|T(?i:hat|he|heir|hen|here|hese|hey|his)"
    "|W(?i:e|hat|hen|hile)|Y(?i:et|ou))"
)

# --------------------------------------------------------------------------------------------------------- the rules
_L = WORD_LETTERS + "&"
_AL = "A-Za-zſıİ\u212a"
_APOSTROPHES = ("'", "’", "‘", "`", "&apo")
_Q = "'’`‘&"
_D = DIGITS

# Of the plain words, these alone fall in two.
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])

RULES = (
    # Words that the treebank splits.
    Rule("can|not", "((?i:can))(?i:not)", _AL),
    Rule("gon|na", "((?i:gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na)))..", _AL),
    Rule("'t|is", "('(?i:t))(?i:is|was)", "'"),
    # Mark-up and entities.
    Rule("tag: <unk>, <a href='x'>", f"({TAG})", "<", _one_word, needs=(">",)),
    Rule("dash", "((?i:&(?:md|mdash|ndash);)|—)", "&—", _dropped),
    Rule("&amp;", f"({AMPERSAND})", "&", _ampersand),
    Rule("treebank entity: &lr;", "((?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);))", "&"),
    # Words.
    Rule("man|'s", f"({WORD}){CONTRACTION}", _L, _without_soft_hyphens, needs=_APOSTROPHES),
    Rule("do|n't", f"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*){NEGATION}", _L, _without_soft_hyphens, needs=_APOSTROPHES),
    Rule("word", f"({WORD})", _L, _without_soft_hyphens),
    Rule("'n'", f"({APOSTROPHE}[nN]{APOSTROPHE}?)", _Q),
    Rule("l', d'", f"([lLdDjJ]{APOSTROPHE})", "lLdDjJ", needs=_APOSTROPHES),
    Rule("ol' Dunkin'", f"((?i:dunkin|somethin|ol){APOSTROPHE})", _AL, needs=_APOSTROPHES),
    Rule("'em, 'cause, 'til", f"({APOSTROPHE}(?i:em|cause|till?))", _Q),
    Rule("c'mon", f"([cC]{APOSTROPHE}(?i:mon))", "cC", needs=_APOSTROPHES),
    Rule("'90s", f"({ANY_APOSTROPHE}[2-9]0(?i:s))", _Q),
    Rule("J'onn", f"([A-HJ-XZn]{ANY_APOSTROPHE}[{LETTERS}]{{2}}[{LETTERS}]*)", "A-HJ-XZn", needs=_APOSTROPHES),
    Rule(
        "ma'am, Hawai'i",
        f"([{LETTERS}]+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z][{LETTERS}]*)",
        LETTERS,
        needs=_APOSTROPHES,
    ),
    Rule("li'l", r"((?i:cont'd\.?|nor'easter|e'er|s'mores|ev'ry|li'l|nat'l))", _AL, needs=("'",)),
    Rule("o'o", f"([oO]{ANY_APOSTROPHE}[oO])", "oO", needs=_APOSTROPHES),
    Rule("C++, F#", r"([cC]\+\+|[cCfF]#)", "cCfF", needs=("+", "#")),
    Rule("y'|all", f"([yY]{APOSTROPHE})[{LETTERS}]", "yY", needs=_APOSTROPHES),
    # Addresses.
    Rule("https://host/path", r'((?i:https?)://[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-])', _AL, needs=("://",)),
    Rule("www.host.org/path", f"({_WWW}{_PATH})", _AL, needs=("www.",)),
    Rule("www.host.org", f"({_WWW})", _AL, needs=("www.",)),
    Rule(
        "host.com/path",
        f"({_HOST}(?:{_PATH})?)",
        r"^ \t\n\f\r\"`'<>|!(){}$,-_",
        needs=(".com", ".net", ".org", ".edu"),
    ),
    Rule("mail@host", f"((?:(?i:&lt;)|<)?{_MAIL}>?)", "&<A-Za-z0-9", needs=("@",), barren=_NO_MAIL),
    Rule("@name", "(@[a-zA-Z_][a-zA-Z_0-9]*)", "@"),
    Rule("#tag", f"(#(?:[{WORD_LETTERS}]|{ENTITY_LETTER})+)", "#"),
    # Contractions that stand alone, as in decoded captions: "they 're here".
    Rule("'re", f"({CONTRACTION})[^A-Za-z]", _Q, _right_quotes),
    Rule("n't", f"({NEGATION})[^A-Za-z]", "nN", _right_quotes, needs=_APOSTROPHES),
    # Numbers.
    Rule("10/12/2005", f"([{_D}]{{1,2}}[-/][{_D}]{{1,2}}[-/][{_D}]{{2,4}})", _D),
    Rule("1,000.5, 12:30, +3", f"([-+]?{NUMBER})", _D + "+.:,\xad٫-", _without_soft_hyphens),
    Rule("x² H₂", "(⁺?(?:²+|₂+))", "⁺²₂"),
    Rule("1 1/2", rf"((?:[{_D}]{{1,4}}[- \xa0])?[{_D}]{{1,4}}(?:\\?/|⁄)[{_D}]{{1,4}})", _D, _one_word),
    Rule("½", "(½)", "½", lambda text: _FRACTIONS.get(text, text)),
    Rule(
        "c'est, pro-",
        f"((?i:c{APOSTROPHE}est|cap{APOSTROPHE}n|s(?:&|&amp;)p-500|s(?:&|&amp;)ls|pro-|anti-|-[lr][rcs]b-))",
        _AL + "-",
        _ampersand,
    ),
    Rule("'05", f"({APOSTROPHE}[0-9][0-9])(?:{SPACE})", _Q),
    Rule("AT&T", f"({AMPERSAND_WORD})", "A-Z", _ampersand, needs=("+", "&")),
    Rule("and/or", f"({SLASHED})", "A-Za-z0-9", needs=("/",)),
    Rule("AT&T.,", f"({AMPERSAND_WORD}\\.){PAUSE}", "A-Z", _ampersand, needs=("+", "&")),
    Rule("2nd, d'Orsay, well-known", f"({COMPOUND})", LETTERS + _D),
    Rule("A$, #", r"([A-Z]*\$|#)", "A-Z$#"),
    Rule("€", "(€)", "€", lambda text: _CURRENCIES.get(text, text)),
    # Abbreviations, and what keeps its period before a comma.
    Rule("Inc. The", f"({CLOSING_ABBREVIATION}){SPACE}(?:{SPACE}|{UPPER}|{TAG})", _AL, resume=1),
    Rule("Inc. said", rf"({CLOSING_ABBREVIATION})[\s\S]{{2}}", _AL),
    Rule("Co. Ltd", rf"((?i:pt[ey]|co)\.){SPACE}(?i:ltd|lim)", _AL),
    Rule("Inc.", f"({CLOSING_ABBREVIATION})", _AL, resume=1),
    Rule("EU-U.S", f"({ACRONYM}){SPACE}", _AL),
    Rule("Dr.", f"({OPEN_ABBREVIATION}|{INITIALS})", _AL),
    Rule("Wii U. The", rf"([A-Za-z])\.{SPACE}+(?:{SENTENCE_WORDS}|{TAG}){SPACE}", _AL),
    Rule("D.C. The", rf"({ACRONYM}\.){SPACE}+(?:{SENTENCE_WORDS}|{TAG}){SPACE}", _AL, resume=1),
    Rule("No. 5", f"({NUMBER_ABBREVIATION}){SPACE}?[{_D}]", _AL),
    Rule("file.txt", f"({FILE})(?:{SPACE}|[.?!,])", WORD_LETTERS + _D, needs=(".",)),
    Rule("word.,", rf"({WORD}\.){PAUSE}", _L, _without_soft_hyphens),
    Rule("2nd.,", rf"({COMPOUND}\.){PAUSE}", LETTERS + _D),
    Rule(
        "1-a.,",
        rf"({DOTTED_COMPOUND}\.){PAUSE}",
        "A-Za-z0-9",
        _without_soft_hyphens,
        needs=("-",),
        barren=_NO_DOTTED_COMPOUND,
    ),
    Rule("555-123-4567", f"({PHONE})", "0-9(+", lambda text: _parentheses(_one_word(text))),
    # Quotation marks, brackets, smileys.
    Rule('"', '("|(?i:&quot;))', '"&', _right_quotes),
    Rule("'quoted", r"(')[A-Za-z][^ \t\n\r\xa0]", "'", _left_quotes),
    Rule("'s and n't at the end", f"({CONTRACTION}|{NEGATION})", _Q + "nN", _right_quotes),
    Rule(":-)", "([<>]?[:;=][-o*']?[()DPdpO\\\\{@|\\[\\]])[^A-Za-z0-9]", "<>:;=", _parentheses),
    Rule(
        "(^_^)",
        r"([\^x=~<>]\.\[\^(?i:x)=[^<]*<>\]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))",
        "x=~<>'^(-",
        _parentheses,
    ),
    Rule("<", "((?i:&lt;)|<)", "&<", lambda text: "<"),
    Rule(">", "((?i:&gt;)|>)", "&>", lambda text: ">"),
    Rule("<<", "(<<|>>)", "<>"),
    Rule("bracket", r"([][(){}])", r"\]\[(){}", _BRACKETS.__getitem__),
    Rule("--", "(-+)", "-", lambda text: _dropped(text) if len(text) in (3, 4) else text),
    Rule("...", r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.|[\x85…])", ".\x85…", _dropped),
    Rule("***", r"(\*+|(?:\\\*){1,3})", r"*\\"),
    Rule("?!", "([?!]+)", "?!"),
    Rule("@@, ##, __", "(@+|#+|_+)", "@#_"),
    Rule("''", "(''|[`’‘“]{1,2}|(?i:&apos;)|')", _Q + "“", _right_quotes),
    Rule(
        "x-1.5-ray",
        f"({DOTTED_COMPOUND})",
        "A-Za-z0-9",
        _without_soft_hyphens,
        needs=("-",),
        barren=_NO_DOTTED_COMPOUND,
    ),
    Rule(
        "space", "([ \t\xa0\u2000]+|(?i:&nbsp;)|\u200b|\x7f|\x01|Ⅰ|‐|٫)", " \t\xa0\u2000&\u200b\x7f\x01Ⅰ‐٫", _dropped
    ),
    Rule("symbol", r"([^ \t\xa0\u2000\u200b\x7f\x01Ⅰ‐٫])", r"^ \t\xa0\u2000\u200b\x7f\x01Ⅰ‐٫"),
)
