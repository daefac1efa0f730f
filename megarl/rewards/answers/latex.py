r"""Text as people and models write it → one form of LaTeX: plain braces, plain names, ASCII digits.

`normalise(r"½ ≤ x < \dfrac 3{\sqrt2}")` is `\frac{1}{2} \leq x < \frac{3}{\sqrt{2}}`. Words stay in `\text{…}`. Nothing
that carries meaning is dropped: what the form does not know stays as it is, for the readers to refuse.
"""

from __future__ import annotations

import re
import unicodedata

from megarl.rewards.answers.vocabulary import (
    ARGUMENTS,
    CHARACTERS,
    FUNCTIONS,
    INVISIBLE,
    KNOWN_WORDS,
    ROOT,
    ROOTS,
    SAME,
    SILENT,
    SKIPPED,
    TEXTS,
    WRAPPERS,
)

_PLAIN = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"&lt;", "<"), (r"&gt;", ">"), (r"&amp;", "&"), (r"&nbsp;", " "),
        (r"\*\*(?=[\d({a-zA-Z-])", "^"), (r"\*\*", ""),
        (r"<=>", r" \\Leftrightarrow "), (r"[<>!]=|=[<>]|->|\+/?-(?=\s*[\d\\a-z(])|\.\.\.+", "__OPERATOR__"),
        (r"(?<=[\w)}\s])\*(?=[\w(\\{\s])", r" \\cdot "),
    )
]  # fmt: skip
_OPERATORS = {"<=": r" \leq ", ">=": r" \geq ", "!=": r" \neq ", "=>": r" \to ", "=<": r" \leq ", "->": r" \to ",
              "+-": r" \pm ", "+/-": r" \pm "}  # fmt: skip
_TOKEN = re.compile(r"\\[a-zA-Z]+\*?|\\.|\s+|.", re.S)


_LINES = re.compile(r"\\(?:begin|end)\{(?:aligned|align|gathered|gather|split|equation|cases)\*?\}")


_SMALL_FRACTION = re.compile("([⁰¹²³⁴-⁹]+)⁄([₀-₉]+)")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")


class Malformed(ValueError):
    """The text is no LaTeX: a brace without its partner, or a command without its argument."""


def normalise(text: str) -> str:
    """Raises Malformed."""
    text = _plain(_characters(text.translate(INVISIBLE)))
    tokens = _commands(_TOKEN.findall(text))
    if tokens.count("{") != tokens.count("}"):
        raise Malformed("a brace without its partner")
    return re.sub(r"\s+", " ", "".join(_braced(tokens))).strip()


def _characters(text: str) -> str:
    """Unicode to ASCII and commands: `½ √3 3² ∞ ３ ٣`."""
    out: list[str] = []
    text = _SMALL_FRACTION.sub(
        lambda f: r"\frac{" + f[1].translate(_RAISED) + "}{" + f[2].translate(_RAISED) + "}", text
    )
    script = ""  # the sub- or superscript that is open
    text = ROOT.sub(lambda found: rf"\sqrt{ROOTS[found[1]]}" + (f"{{{found[2]}}}" if found[2] else ""), text)
    for c in unicodedata.normalize("NFC", text):
        kind, _, plain = unicodedata.decomposition(c).partition(" ")
        opened = {"<super>": "^", "<sub>": "_"}.get(kind, "") if c not in "ªº" else ""
        if script and opened != script:
            out.append("}")
        if opened and opened != script:
            out.append(opened + "{")
        script = opened
        if opened:
            out.append("".join(chr(int(code, 16)) for code in plain.split()).replace("−", "-"))
        elif kind == "<fraction>":
            whole, _, part = unicodedata.normalize("NFKC", c).partition("⁄")
            out.append(rf"\frac{{{whole}}}{{{part}}}")
        elif c in CHARACTERS:
            out.append(CHARACTERS[c])
        elif c.isdecimal():
            out.append(str(unicodedata.decimal(c)))
        elif c == "\u2028" or c.isspace():
            out.append(" ")
        elif kind in ("<wide>", "<narrow>", "<font>", "<small>", "<compat>", "<circle>"):
            out.append(unicodedata.normalize("NFKC", c))
        else:
            out.append(c)
    return "".join(out) + ("}" if script else "")


def _plain(text: str) -> str:
    """What is written without LaTeX: `**bold**`, `x**2`, `<=`, `sqrt(3)`, `pi`; math delimiters go."""
    text = re.sub(r"^\s*\*\*(.+)\*\*\s*$", r"\1", text, flags=re.S)
    text = re.sub(r"(?<=\d)\{\s*,\s*\}(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(\\log\s*_)\s*(\d)", r"\1{\2}", text)  # \log_210 is not of base 210
    if _LINES.search(text) and (r"\begin{cases}" not in text or "&" not in text):
        text = re.sub(r"&", " ", _LINES.sub(" ", text))
    text = re.sub(r"(?<=\d)\{\s*,\s*\}(?=\d)", ".", text)  # 3{,}14
    text = re.sub(r"\{\s*([:=;])\s*\}", r"\1", text)
    text = re.sub(r"\\not\s*(=|\\in\b)", lambda found: r"\neq " if found[1] == "=" else r"\notin ", text)
    text = re.sub(r"(?<!\\)\\[()\[\]](?!\d*\.?\d+(?:pt|em|ex))", " ", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$+", " ", text)
    for pattern, new in _PLAIN:
        if new == "__OPERATOR__":
            text = pattern.sub(lambda found: _OPERATORS.get(found[0], r" \ldots "), text)
        else:
            text = pattern.sub(new, text)
    return text


def _commands(tokens: list[str]) -> list[str]:
    """Commands under one name each; styles, sizes and spaces that show nothing are gone; words in `\\text{…}`."""
    out: list[str] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        name = token[1:].rstrip("*") if token[0] == "\\" else ""
        if token in (r"\,", r"\;", r"\:", r"\>", "\\ ", "~", "\\\n", "\\\t"):
            out.append(" ")
        elif token == r"\!":
            continue
        elif token == r"\%":
            out.append("%")
        elif token in (r"\_", r"\&", r"\#", r"\'", r"\"", r"\-"):
            out.append(token[1])
        elif name in SKIPPED:
            for _ in range(SKIPPED[name]):
                _, i = _argument(tokens, i)
        elif name in ("num", "ang", "SI", "qty", "si", "unit"):  # of siunitx
            group, i = _argument(tokens, i) if name not in ("si", "unit") else ([], i)
            out += [*_commands(group), *([r"^{\circ}"] if name == "ang" else [])]
            if name not in ("num", "ang"):
                group, i = _argument(tokens, i)
                out += [r"\text", "{", *"".join(group).replace("\\", " "), "}"]
        elif name in ("textcolor", "tag"):
            _, i = _argument(tokens, i)
        elif name in TEXTS:
            group, i = _argument(tokens, i)
            out += _words(group, name)
        elif name in WRAPPERS:
            group, i = _argument(tokens, i)
            inner = _commands(group)
            out += inner if re.fullmatch(r"\s*\(?\s*\w\s*\)?\s*", "".join(inner)) else ["{", *inner, "}"]
        elif name in SILENT:
            if i < len(tokens) and tokens[i] == ".":  # \left. and \right. show nothing
                i += 1
        elif name in ("begin", "end"):
            group, i = _argument(tokens, i)
            out.append(rf"\{name}{{{''.join(group).strip('*')}}}")
            if "".join(group) == "array" and name == "begin" and i < len(tokens) and tokens[i] == "{":
                _, i = _argument(tokens, i)  # how its columns are set
        else:
            out.append(SAME.get(name, token))
            if name in SAME and out[-1][-1:].isalpha():
                out.append(" ")
    return out


def _words(group: list[str], command: str) -> list[str]:
    r"""The tokens of `\text{…}`: letters stay in it, anything without letters does not need it."""
    inner = "".join(_commands(group))
    bare = inner.strip()
    if not any(c.isalpha() for c in bare) or (command == "mathrm" and bare in ("e", "i", "d")):
        return list(_TOKEN.findall(inner))
    if command == "operatorname" and bare in FUNCTIONS:
        return ["\\" + bare, " "]
    if "\\" in bare or "{" in bare:  # a formula among words, or words within words
        return [*_TOKEN.findall(inner)]
    if found := re.match(r"[-+]?\d[\d.,/: ]*(?=[a-zA-Z])", bare):  # \text{36 cm}
        return [*found[0], r"\text", "{", *bare[found.end() :], "}"]
    if found := re.match(r"\(\s*(\w)\s*\)\s*\.?|(?:option|choice)\s+([A-H])\s*\.?$", bare, re.I):  # a choice
        rest = bare[found.end() :].strip()
        return ["(", found[1] or found[2], ")", *([" ", r"\text", "{", *rest, "}"] if rest else [])]
    if bare[0] in ":.)":
        return [bare[0], " ", r"\text", "{", *bare[1:].strip(), "}"]
    return [r"\text", "{", *inner, "}"]


def _argument(tokens: list[str], i: int) -> tuple[list[str], int]:
    """The tokens of the argument that begins at or after i, without its braces, and where it ends."""
    while i < len(tokens) and tokens[i].isspace():
        i += 1
    if i == len(tokens) or tokens[i] == "}":
        raise Malformed("a command without its argument")
    if tokens[i] != "{":
        return [tokens[i]], i + 1
    end = _closing(tokens, i, "{", "}")
    return tokens[i + 1 : end], end + 1


def _closing(tokens: list[str], start: int, opens: str, closes: str) -> int:
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] == opens) - (tokens[i] == closes)
        if not depth:
            return i
    raise Malformed(f"{opens} is never closed")


def _braced(tokens: list[str]) -> list[str]:
    r"""Every argument in braces: `\frac12`, `\sqrt3`, `x^2`, `10^-3`, `2^10`, `x^(n+1)`."""
    out: list[str] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if token == r"\text":
            end = _closing(tokens, i, "{", "}")
            out += [r"\text{", "".join(tokens[i + 1 : end]), "}"]
            i = end + 1
            continue
        out.append(token)
        if token.isalpha() and not (len(out) > 1 and out[-2][-1:].isalpha()):
            i = _name(tokens, i, out)
            token = out[-1]
        if token == r"\sqrt":
            i = _optional(tokens, i, out)
        for _ in range(ARGUMENTS.get(token, 0)):
            argument, i = _argument_of(token, tokens, i)
            out += ["{", *_braced(argument), "}"]
        if token[0] == "\\" and token[1:].isalpha() and i < len(tokens) and tokens[i].isalpha():
            out.append(" ")
    return out


def _name(tokens: list[str], i: int, out: list[str]) -> int:
    """A run of letters that is a function's or constant's name becomes the command."""
    end = i
    while end < len(tokens) and len(tokens[end]) == 1 and tokens[end].isalpha():
        end += 1
    command = KNOWN_WORDS.get("".join([out[-1], *tokens[i:end]]))
    if command is None:
        out += tokens[i:end]
        return end
    out[-1] = command
    return end


def _optional(tokens: list[str], i: int, out: list[str]) -> int:
    if i < len(tokens) and tokens[i] == "[":
        end = _closing(tokens, i, "[", "]")
        out += ["[", *_braced(tokens[i + 1 : end]), "]"]
        return end + 1
    return i


def _argument_of(command: str, tokens: list[str], i: int) -> tuple[list[str], int]:
    """As TeX reads it, but for what people write without braces."""
    while i < len(tokens) and tokens[i].isspace():
        i += 1
    if i < len(tokens) and tokens[i] == "(" and command in ("^", "_", r"\sqrt"):
        end = _closing(tokens, i, "(", ")")
        return tokens[i + 1 : end], end + 1
    if command in ("^", "_", r"\sqrt") and i < len(tokens):
        end = i + (tokens[i] == "-" and command == "^")
        while end < len(tokens) and tokens[end].isdigit() and command != r"\sqrt":
            end += 1
        if end > i + 1:
            return tokens[i:end], end
    if i < len(tokens) and tokens[i] in ARGUMENTS:  # \frac\sqrt{2}2 and e^\frac{1}{2}
        inner: list[str] = [tokens[i]]
        end = i + 1
        for _ in range(ARGUMENTS[tokens[i]]):
            argument, end = _argument_of(tokens[i], tokens, end)
            inner += ["{", *argument, "}"]
        return inner, end
    return _argument(tokens, i)
