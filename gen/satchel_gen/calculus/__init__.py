"""Differentiation, delta contraction and structure of formulas in index notation. Pure functions."""
