"""What a file may say to do harm: texts that steer terminals, pages or shells, and numbers that are none."""

from __future__ import annotations

TEXTS = {
    "attribute": "__class__",
    "method": "forward",
    "state": "training",
    "newline": "a\nb",
    "carriage return": "good\rbad",
    "quotes": "a'b\"c`d",
    "dots": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "backslashes": "..\\..\\a\\n",
    "long": "x" * 10**5,
    "long and strange": "\x1b" * 10**5,
    "override": "abc\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "nul": "a\x00b",
    "surrogate": "a\ud800b",
    "line separator": "a\u2028b\u2029c\x85d\x0be",
    "rich": "[red]x[/red][link=http://a.b]y[/link]:smile:",
    "html": "<script>alert(1)</script>",
    "attribute of html": "\" onload='x' id=\"y",
    "entity": "&lt;b&gt;&#x3c;",
    "cdata": "]]><b>",
    "markdown": "# x\n- [a](javascript:1) ![i](x) | **b** ~~c~~ @user www.a.b https://a.b",
    "list": "- item",
    "numbered": "1. item",
    "underline": "=== x",
    "code": "    code",
    "expression": "${{ github.token }} ${HOME} $(id)",
    "mathtext": "$\\frac{",
    "math": "$x^2$ $",
    "command": "::error title=x::y",
    "command in a line": "a ::stop-commands::b",
    "old command": "a ##[error]b ##vso[task.setvariable]c",
    "formula": '=HYPERLINK("http://a.b")',
    "plus": "+1+1",
    "minus": "-1+1",
    "at": "@SUM(1)",
    "tab formula": "\t=1+1",
    "format": "{0.__class__} {x!r} %s %(a)s %n",
    "jinja": "{{ 7*7 }}{% raw %}",
    "glob": "*?[a-z]",
    "empty": "",
    "space": " ",
    "wide": "漢字" * 30,
    "combining": "e" + "\u0301" * 300,
    "url": "file:///etc/passwd",
    "colour of a plot": '#1f5fb4 url(#a) id="b',
    "percent": "100%25%0A::error::x",
}

NUMBERS = (
    "1_0", "١", "１", "²", "-1/-2", "1e400", "nan", "inf", "-inf", "0x10", "0b1", " 1 ", "1 ", "\t1", "1\n", "+1",
    "1e-400", "1/0", "1//2", "1/2/3", "", "1,5", "1e", "e1", ".", "--1", "1.2.3", "1e1e1", "1j", "True", "None",
    "1" * 5000, "9" * 400,
    "\u0661/\u0662", "1\u00a0", "½", "1e٣", "0" * 5000 + "1",
)  # fmt: skip
"""None of them is a number that an option takes, whatever Python's int() and float() say."""


def is_sentence(text: str) -> bool:
    """One line of bounded length that steers nothing."""
    return text.isprintable() and 0 < len(text) <= 2100
