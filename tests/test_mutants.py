"""The mutants that `make mutants` runs can still be made: code that has moved on leaves none behind unnoticed."""

from __future__ import annotations

import pytest

from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_text_is_there_once(mutant: Mutant) -> None:
    assert mutant.occurrences() == 1
    assert (ROOT / mutant.tests).exists()
