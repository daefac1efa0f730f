r"""What the default grader reads: answers in LaTeX, Unicode or plain text, whole or not at all.

latex (one form for each text) · reading (text → one of the kinds) · scan, words, units, numerals, expressions (its
parts) · kinds · regions (sets of real numbers) · same (when two answers are). vocabulary has the tables.
"""
