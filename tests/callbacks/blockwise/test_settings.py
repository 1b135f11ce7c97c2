"""Settings of update rules that contradict one another or mean nothing fail when they are written."""

import pytest

from callbacks import BlockwisePruning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"update_rule": "entropy"},
            "`update_rule` expected to be one of fixed, outlier, .* but got 'entropy'",
        ),
        (
            {"update_rule": "attention", "non_updated": "v"},
            "`non_updated` = 'v' belongs to update_rule fixed, but",
        ),
        ({"method": "wanda", "update_rule": "outlier"}, "`update_rule` = 'outlier' belongs to method d2prune"),
        ({"candidates": "pairs"}, "`candidates` expected to be one of single, all, partial but got 'pairs'"),
        ({"objective": "kl"}, "`objective` expected to be one of output, divergence but got 'kl'"),
        ({"reference": "dense"}, "`reference` expected to be one of model, block but got 'dense'"),
        ({"rule_windows": 0}, "`rule_windows` expected to be a positive integer but got 0"),
        ({"rho": -1.0}, "`rho` expected to be a number of at least 0 but got -1"),
    ],
)
def test_wrong_settings_fail_when_written(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockwisePruning(sparsity=0.5, **arguments)
