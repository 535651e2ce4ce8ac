"""One file per kernel template: from a program to its context of printed code."""
