"""Formulas and programs become text: mathematics, ATen and Triton source, files."""
