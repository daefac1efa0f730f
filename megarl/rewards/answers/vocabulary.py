r"""Tables: characters and commands and what stands for them, and the words that mean something."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    return text.split()


CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r" \times ", "⋅": r" \cdot ", "·": r" \cdot ",
    "∙": r" \cdot ", "∗": r" \cdot ", "÷": r" \div ", "∕": "/", "⁄": "/", "±": r" \pm ", "∓": r" \mp ", "≤": r" \leq ",
    "≥": r" \geq ", "⩽": r" \leq ", "⩾": r" \geq ", "≦": r" \leq ", "≧": r" \geq ", "≠": r" \neq ", "≈": r" \approx ",
    "≅": r" \cong ", "≡": r" \equiv ", "∞": r" \infty ", "∪": r" \cup ", "∩": r" \cap ", "∈": r" \in ",
    "∉": r" \notin ",
    "∅": r" \emptyset ", "∖": r" \setminus ", "⊂": r" \subset ", "⊆": r" \subseteq ", "→": r" \to ", "⟶": r" \to ",
    "⇒": r" \to ", "…": r" \ldots ", "⋯": r" \ldots ", "°": r"^{\circ}", "º": r"^{\circ}", "℃": r"^{\circ}\text{C}",
    "℉": r"^{\circ}\text{F}", "′": "'", "’": "'", "‘": "'", "″": "''", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∠": r"\angle ", "△": r"\triangle ", "∣": "|",
    "∥": r"\parallel ", "⊥": r"\perp ", "、": ", ", "。": ".", "٫": ".", "٬": ",", "“": '"', "”": '"', "µ": r"\mu ",
    "∆": r"\Delta ", "∑": r"\sum ", "∫": r"\int ", "∏": r"\prod ", "∨": r"\lor ", "∧": r"\land ", "‖": r"\| ",
}  # fmt: skip
GREEK = words(
    """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau
    upsilon phi chi psi omega
    """
)
CHARACTERS |= {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(GREEK)}
CHARACTERS |= {
    c: rf"\{n} " for c, n in zip("ΓΔΘΛΞΠΣΦΨΩ", words("Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"), strict=True)
}
ROOT = re.compile(r"([√∛∜])(\d+(?:\.\d+)?)?")
ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u2061\u2062"), None)

SAME = {  # command → what stands for it
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "nicefrac": r"\frac", "sfrac": r"\frac",
    "dbinom": r"\binom",     "tbinom": r"\binom", "le": r"\leq", "leqslant": r"\leq", "leqq": r"\leq",
    "ge": r"\geq", "geqslant": r"\geq",
    "geqq": r"\geq", "ne": r"\neq", "lt": "<", "gt": ">", "dots": r"\ldots", "cdots": r"\ldots", "dotsc": r"\ldots",
    "dotsb": r"\ldots", "rightarrow": r"\to", "longrightarrow": r"\to", "Rightarrow": r"\to", "implies": r"\to",
    "Longrightarrow": r"\to", "lbrace": r"\{", "rbrace": r"\}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "degree": r"^{\circ}", "varnothing": r"\emptyset",
    "backslash": r"\setminus", "smallsetminus": r"\setminus", "ast": r"\cdot", "cdotp": r"\cdot",
    "thickapprox": r"\approx",     "colon": ":", "iff": r"\Leftrightarrow", "infin": r"\infty", "wedge": r"\land",
    "vee": r"\lor",
    "lg": r"\log", "tg": r"\tan", "ctg": r"\cot", "euro": "€", "pounds": "£",
    "textdollar": r"\$", "textdegree": r"^{\circ}", "textsuperscript": "^", "percent": "%", "R": r"\mathbb{R}",
    "N": r"\mathbb{N}", "Z": r"\mathbb{Z}", "Q": r"\mathbb{Q}", "vartheta": r"\theta", "varphi": r"\phi",
    "varepsilon": r"\epsilon", "owns": r"\ni", "thinspace": " ", "quad": " ", "qquad": " ", "enspace": " ",
    "space": " ",     "nobreakspace": " ", "newline": r"\\", "mspace": " ",
}  # fmt: skip
SILENT = set(
    words(
        """
    left right bigl bigr Bigl Bigr biggl biggr Biggl Biggr big Big bigg Bigg middle displaystyle textstyle
    scriptstyle large Large LARGE huge Huge small tiny normalsize bf rm it limits nolimits boldmath therefore
    bfseries itshape checkmark blacksquare qed mathstrut strut centering
    """
    )
)
WRAPPERS = set(words(
    """
    boxed fbox framebox boldsymbol bm pmb mathbf mathit mathsf mathtt mathcal mathfrak mathnormal underline
    ensuremath displaylines emph mathop mathord mathrel mathbin textup smash
    """
))  # fmt: skip
TEXTS = set(
    words(
        """
    text textbf textit textrm textnormal textsf texttt textsc mbox hbox mathrm rm operatorname
    """
    )
)
SKIPPED = {"color": 1, "hspace": 1, "vspace": 1, "phantom": 1, "hphantom": 1, "vphantom": 1, "label": 1, "kern": 0}
ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1, "_": 1, r"\overline": 1, r"\bar": 1, r"\dot": 1,
              r"\mathbb": 1, r"\vec": 1, r"\hat": 1, r"\widehat": 1, r"\tilde": 1, r"\overrightarrow": 1, r"\pmod": 1,
              r"\overset": 2, r"\underset": 2, r"\dotsm": 0}  # fmt: skip
FUNCTIONS = words(
    """
    arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp max min gcd lcm det dim ker deg lim
    """
)
KNOWN_WORDS = {
    "sqrt": r"\sqrt",
    "pi": r"\pi",
    "infinity": r"\infty",
    "infty": r"\infty",
    "inf": r"\infty",
    "theta": r"\theta",
}
KNOWN_WORDS |= {name: "\\" + name for name in FUNCTIONS if name not in ("dim", "deg", "ker", "lim", "min", "max")}
NO_UNIT = set(
    words(
        """
    and or not more less least most than if when where mod plus minus times divided over between remainder
    undefined half factorial to from for all is are with only but then else both either exactly infinity
    choose root sqrt solution solutions no none each as does exist any in base other of a an the modulo real
    complex reals integer
    """
    )
) - {"of"}
READ_COMMANDS = set(
    words(
        """
    frac sqrt binom cdot times div pi alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi
    rho sigma tau phi chi psi omega Delta Theta Lambda Sigma Phi Psi Omega sin cos tan cot sec csc arcsin
    arccos arctan sinh cosh tanh log ln exp max min gcd lcm lfloor rfloor lceil rceil sum int prod infty
    """
    )
)
NUMBER_WORDS = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
    """
)
