"""Over 100 regexes, 30 grammars in Lark's notation and choices of many kinds, for conformance runs.

Most have no long texts, so that a model without any sense comes to an end, too.
"""

from __future__ import annotations

REGEXES = [
    # characters and classes
    "a",
    "abc",
    "a.c",
    "[abc]",
    "[^abc]",
    "[a-z]{3}",
    "[A-Za-z0-9_]{5,9}",
    "[-+]?[0-9]{1,4}",
    r"\d{3}",
    r"\D{2}",
    r"\w{4}",
    r"\W{2}",
    r"\s{1,2}x",
    r"\S{3,5}",
    "[^\\s]{4}",
    r"[\d.]{3}",
    r"[\w-]{2,6}",
    "[]a]{2}",
    "[a\\]]{2}",
    r"[\^a]{2}",
    # repetitions
    "a{3}",
    "a{2,4}",
    "a{,3}b",
    "(ab){2,3}",
    "a?b?c?d",
    "(a|b){5}",
    "x{0}y",
    "(a{1,2}b){2}",
    "a+?b",
    "(?:ab?){3}",
    "[ab]*c",
    "(x+y)?z",
    "((a|b)c){1,3}",
    "a{10}",
    "[01]{32}",
    "(foo|bar){1,2}baz",
    "q*",
    "[^x]{0,5}x",
    # alternatives and groups
    "yes|no",
    "a|ab|abc",
    "(a|ab)(c|bcd)",
    "|a",
    "(?P<year>[0-9]{4})-(?P<month>[0-9]{2})",
    "(?:one|two) (?:three|four)?",
    "cat|category|catalogue",
    "((((deep))))",
    "(a|(b|(c|d)))e",
    "(?i)hello",
    "(?i:a)b",
    "(?s).{3}",
    "(?:){2}z",
    "^anchored$",
    "^(a|b)$",
    "(^a|b)c$",
    # escapes
    r"\.\*\+\?",
    r"\[\]\(\)\{\}",
    r"\\",
    r"\/",
    r"a\tb",
    r"a\nb",
    r"\x41\x42",
    r"\u00e9\u00e8",
    r"[\x30-\x39]{2}",
    r"\$\^\|",
    '"[^"]{0,6}"',
    r"'(\\.|[^'\\]){0,5}'",
    r"\-\_\:",
    # unicode
    "é",
    "[é-ü]{3}",
    "日本語?",
    r"[\u4e00-\u4e10]{2}",
    "[😀-😅]{2}",
    "🦜+!",
    "e\u0301{1,2}",
    "[^ -~]{3}",
    "[α-ωΑ-Ω]{4}",
    "ß|ss",
    "(?i)straße",
    "[ぁ-ん]{2,4}",
    "한국(어|인)",
    # what people match
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"v?\d+\.\d+\.\d+",
    r"\+?[0-9]{1,3}[ -]?[0-9]{6,10}",
    "#[0-9a-f]{6}",
    "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    r"[a-z0-9._]{1,8}@[a-z]{2,6}\.(com|org|net)",
    r"https?://[a-z]{2,8}\.[a-z]{2,3}(/[a-z0-9]{1,5}){0,3}",
    "[A-Z]{2}[0-9]{2}( [A-Z0-9]{4}){3,5}",
    r"\$[0-9]{1,3}(,[0-9]{3})*\.[0-9]{2}",
    "[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){1,2}",
    "(GET|POST|PUT) /[a-z]{1,6}(/[0-9]{1,3})?",
    r"[0-9]{1,2}(\.5)? (stars?|points)",
    r"\{\"ok\": (true|false)\}",
    "(0|[1-9][0-9]{0,5})",
    r"-?(0|[1-9]\d{0,3})(\.\d{1,2})?([eE][+-]?\d)?",
    "(true|false|null)",
    "[ACGT]{12}",
    "M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{1,3})",
    "(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day",
    "[a-h][1-8](-[a-h][1-8])?",
    "([0-9A-F]{2}:){5}[0-9A-F]{2}",
    r"(- [a-z]{1,8}\n){1,3}",
    r"<(b|i)>[a-z ]{1,8}</(b|i)>",
    r"(INFO|WARN|ERROR) \[[a-z]{1,6}\] [a-z ]{1,12}",
    r"Answer: (A|B|C|D)\.",
    r"Thought: .{1,20}\nAction: (search|stop)",
    r"\|( [a-z]{1,4} \|){2,3}",
    "Q[1-4] 20[0-9]{2}",
    "[01]?[0-9]/[0-3]?[0-9]/[0-9]{2}",
]

GRAMMARS = {
    "a word": 'start: "hello"',
    "alternatives": 'start: "yes" | "no" | "maybe"',
    "sequence": 'start: "a" "b"? "c"',
    "bounded repetition": 'start: "x"~2..4 "y"~3',
    "rules": """
        start: greeting " " name
        greeting: "Hello" | "Hi"
        name: "Ann" | "Bob"
    """,
    "terminals": """
        start: WORD
        WORD: /[a-z]{1,6}/
    """,
    "terminals of terminals": """
        start: PAIR
        PAIR: KEY "=" VALUE
        KEY: /[a-z]{1,3}/
        VALUE: /[0-9]{1,3}/
    """,
    "ranges": 'start: "a".."f" "0".."9"',
    "a case-insensitive word": 'start: "select"i " " "x"',
    "an optional group": 'start: "a" [ "b" "c" ] "d"',
    "nested groups": 'start: ("a" | ("b" "c"?)) ("d" | "e")',
    "balanced": 'start: "(" start ")" | "x"',
    "balanced of two kinds": 'start: "(" start ")" | "[" start "]" | "."',
    "a list": """
        start: "[" [item ("," item)~0..3] "]"
        item: /[0-9]/
    """,
    "sums": """
        start: term (("+" | "-") term)~0..3
        term: factor ("*" factor)~0..2
        factor: /[0-9]{1,2}/
    """,
    "parentheses in sums": """
        start: sum
        sum: product ("+" product)?
        product: atom ("*" atom)?
        atom: /[0-9]/ | "(" sum ")"
    """,
    "assignments": r"""
        start: (line "\n")~1..3
        line: /[a-z]/ " = " /[0-9]{1,3}/
    """,
    "ignored space": """
        start: "a" "b" "c"
        %ignore " "
    """,
    "common numbers": """
        %import common.INT
        start: INT "/" INT
    """,
    "common names": """
        %import common.CNAME
        start: "let " CNAME ";"
    """,
    "imports at once": """
        %import common (DIGIT, LETTER)
        start: LETTER DIGIT DIGIT
    """,
    "JSON": r"""
        start: value
        value: "null" | "true" | "false" | NUMBER | array | object
        array: "[" [value ("," value)~0..1] "]"
        object: "{" [pair] "}"
        pair: "\"" /[a-z]{1,4}/ "\":" value
        NUMBER: /-?[0-9]{1,3}/
    """,
    "SQL": """
        start: "SELECT " columns " FROM " NAME [" WHERE " condition]
        columns: "*" | NAME ("," NAME)~0..2
        condition: NAME " " OP " " VALUE
        OP: "=" | "<" | ">"
        NAME: /[a-z]{1,6}/
        VALUE: /[0-9]{1,3}/ | "'" /[a-z]{0,5}/ "'"
    """,
    "calls": """
        start: NAME "(" [argument (", " argument)~0..2] ")"
        argument: NAME "=" (STRING | INT)
        NAME: /[a-z]{2,6}/
        STRING: /"[a-z ]{0,6}"/
        INT: /[0-9]{1,3}/
    """,
    "XML": """
        start: "<a>" inner "</a>"
        inner: TEXT | "<b>" TEXT "</b>"
        TEXT: /[a-z ]{1,8}/
    """,
    "moves": """
        start: (NUMBER ". " move " " move " ")~1..2
        move: /[NBRQK]?[a-h][1-8]/ | "O-O"
        NUMBER: /[1-9]/
    """,
    "unicode": """
        start: "日本" ("語" | "人") EMOJI
        EMOJI: /[😀-😅]{1,2}/
    """,
    "comments and aliases": """
        // a comment
        start: "a" -> first // another
          | "b" -> second
    """,
    "inlined rules": """
        ?start: _pair | single
        _pair: single "," single
        !single: "a" | "b"
    """,
    "escapes": 'start: "\\"" "\\\\" "\\n" "\\t" "\\u00e9"',
    "a long chain": "start: a0\n" + "\n".join(f'a{i}: "{i % 10}" a{i + 1}' for i in range(30)) + '\na30: "."',
}

WORDS = ("alpha", "beta", "gamma", "delta", "größe", "日本", "naïve", "🦜", "e\u0301t\u00e9", "new york")
CHOICES: dict[str, list[str]] = {
    "two": ["positive", "negative"],
    "one": ["the only one"],
    "prefixes of one another": ["a", "ab", "abc", "abcd", "abcde", "b", "ba"],
    "prefixes with spaces": ["New", "New York", "New York City", "York"],
    "unicode": ["é", "e\u0301", "日本", "日本語", "🦜", "🦜🦜", "👩‍👩‍👧", "👩", "עברית", "ﷺ"],
    "lines and quotes": [
        "a\nb",
        "a\nb\n",
        '"',
        "\\",
        "{}",
        "a|b",
        "(.*)",
        "[x]",
        "^$",
        " leading",
        "trailing ",
    ],
    "100": [f"{word} {i}" for i in range(10) for word in WORDS],
    "1,000": [f"{word}-{i}" for i in range(100) for word in WORDS],
    "1,000 numbers": [str(i) for i in range(1000)],
    "300 prefixes": ["x" * i for i in range(1, 301)],
}
