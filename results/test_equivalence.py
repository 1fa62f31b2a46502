"""`--variant released` against figures of the authors' own code, which results/equivalence.py has written.

Their code is not needed here: weights, batches and noise are drawn anew, from NumPy. Both compute in float64.
"""

import json
from pathlib import Path

import equivalence
import numpy as np
import pytest

FIGURES = json.loads((Path(__file__).parent / "equivalence.json").read_text())
# The largest difference was 2e-15, with AVX2 and without. The rest is left to the rounding of other machines.
TOLERANCE = 1e-10  # of a metric's largest value, of how far a network has moved, and of an action


@pytest.mark.parametrize("name", equivalence.KEPT)
def test_released_computes_what_the_authors_code_computes(name):
    """Over 30 updates, in which the policy's average begins to move; then acting in 10 states."""
    theirs = FIGURES[name]
    ours = equivalence.figures(equivalence.run(equivalence.Ours(equivalence.settings(*equivalence.CASES[name]))))
    for metric, values in theirs["metrics"].items():
        error = np.abs(np.subtract(ours["metrics"][metric], values)).max()
        assert error <= TOLERANCE * np.abs(values).max(), metric
    for network, a, b in zip(equivalence.NETWORKS, ours["moved"], theirs["moved"]):
        assert abs(a - b) <= TOLERANCE * b, f"the weights of the {network}"
    assert ours["actions"] == pytest.approx(theirs["actions"], rel=0, abs=TOLERANCE), "acting"
