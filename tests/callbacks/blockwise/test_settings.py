"""Settings of BlockwisePruning: every pair of choice and setting is accepted or refused, as the table says, when written."""

import inspect

import pytest

from callbacks import (
    AdmmSolver,
    AttentionRule,
    BlockwisePruning,
    DepthAllocation,
    Diagnostics,
    ErrorAllocation,
    FixedRule,
    JointSolver,
    ObsSolver,
    OutlierRule,
    OwlAllocation,
    PerplexityRule,
    Score,
    UniformAllocation,
)

UPDATING = ("d2prune", "sparsegpt", "d2_sparsegpt")
APPLIES = {
    "score": ("d2prune", "d2_wanda", "d2_sparsegpt"),
    "update_rule": ("d2prune",),
    "solver": UPDATING,
    "target": UPDATING,
    "class_token_weight": ("d2prune", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt"),
    "allocation": ("d2prune", "magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt"),
}
"""Setting -> methods that have a use for it."""
VALUES = {
    "score": [Score(lambda1=2.0)],
    "update_rule": ["outlier", FixedRule("none")],
    "solver": ["obs", AdmmSolver()],
    "target": [0.35, 1],
    "class_token_weight": [16.0, 0.5],
    "allocation": ["owl", ErrorAllocation(), DepthAllocation(-0.2)],
}
CHOICES = {
    AttentionRule: {"candidates": "all", "objective": "divergence", "reference": "block", "windows": 2, "source": "x.txt"},
    FixedRule: {"held": "k"},
    OutlierRule: {},
    PerplexityRule: {},
    ObsSolver: {"block_size": 64, "damping": 0.1},
    AdmmSolver: {"block_size": 64, "damping": 0.1},
    JointSolver: {"compared": "row", "damping": 0.1},
    UniformAllocation: {},
    OwlAllocation: {"threshold": 3.0, "spread": 0.05},
    ErrorAllocation: {},
    DepthAllocation: {"slope": -0.1},
}
"""Choice -> its settings, other than the defaults."""
ALL_SETTINGS = {name: value for settings in CHOICES.values() for name, value in settings.items()} | {"rho": 2.0}


@pytest.mark.parametrize("method", APPLIES["allocation"])
@pytest.mark.parametrize("setting", APPLIES)
def test_what_a_method_has_no_use_for_is_refused(method, setting):
    for value in VALUES[setting]:
        if method in APPLIES[setting]:
            BlockwisePruning(method=method, sparsity=0.5, **{setting: value})
        else:
            with pytest.raises(
                ValueError, match=rf"`{setting}` belongs to .*, but `method` is '{method}'. Leave it out, or use"
            ):
                BlockwisePruning(method=method, sparsity=0.5, **{setting: value})


@pytest.mark.parametrize("choice", CHOICES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_a_choice_takes_its_own_settings_only(choice, setting):
    accepted = inspect.signature(choice).parameters
    if setting == "rho" and choice is AttentionRule:
        assert choice(objective="divergence", rho=2.0).rho == 2.0
    elif setting in accepted:
        assert getattr(choice(**{setting: ALL_SETTINGS[setting]}), setting) == ALL_SETTINGS[setting]
    else:
        with pytest.raises(TypeError, match=f"{setting}|takes no arguments"):
            choice(**{setting: ALL_SETTINGS[setting]})


@pytest.mark.parametrize("allocation", ["owl", "error", "depth"])
def test_a_pattern_leaves_nothing_to_allocate(allocation):
    with pytest.raises(
        ValueError, match=r"`allocation` = .* gives blocks different shares of zeros, but with `pattern` = '2:4'"
    ):
        BlockwisePruning(pattern="2:4", allocation=allocation)
    BlockwisePruning(pattern="2:4", allocation="uniform")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BlockwisePruning(sparsity=0.5, update_rule="entropy"),
            r"`update_rule` expected to be one of .* but got 'entropy'",
        ),
        (lambda: BlockwisePruning(sparsity=0.5, update_rule=ObsSolver()), r"`update_rule` expected .* but got ObsSolver"),
        (lambda: BlockwisePruning(sparsity=0.5, allocation="lamp"), "`allocation` expected to be one of uniform .* got 'lamp'"),
        (lambda: BlockwisePruning(sparsity=0.5, ignore="head"), "`ignore` expected to be a list of globs but got 'head'"),
        (lambda: BlockwisePruning(sparsity=0.5, precision="low"), "`precision` expected to be auto, highest or high but got"),
        (lambda: AttentionRule(candidates="pairs"), "`candidates` expected to be one of single, all, partial but got 'pairs'"),
        (lambda: AttentionRule(objective="kl"), "`objective` expected to be one of output, divergence but got 'kl'"),
        (lambda: AttentionRule(reference="dense"), "`reference` expected to be one of model, block but got 'dense'"),
        (lambda: AttentionRule(windows=0), "`windows` expected to be an integer of at least 1 but got 0"),
        (lambda: AttentionRule(windows=True), "`windows` expected to be an integer of at least 1 but got True"),
        (
            lambda: AttentionRule(rho=2.0),
            "`rho` = 2.0 weighs the KL term of `objective: divergence`, but `objective` is 'output'",
        ),
        (lambda: AttentionRule(objective="divergence", rho=-1.0), "`rho` expected to be a number of at least 0 but got -1"),
        (lambda: FixedRule("o"), "`held` expected to be one of q, k, v, none, all but got 'o'"),
        (lambda: ObsSolver(block_size=0), "`block_size` expected to be an integer of at least 1 but got 0"),
        (lambda: AdmmSolver(damping=2.0), r"`damping` expected to be in \[0, 1\] but got 2.0"),
        (lambda: JointSolver(compared="block"), "`compared` expected to be one of matrix, row but got 'block'"),
        (lambda: BlockwisePruning(sparsity=0.5, target=1.5), r"`target` expected to be pruned or a share in \[0, 1\] .* 1.5"),
        (lambda: BlockwisePruning(sparsity=0.5, target="dense"), r"`target` expected to be pruned or .* but got 'dense'"),
        (lambda: BlockwisePruning(sparsity=0.5, stages="o"), "`stages` expected to be true or false but got 'o'"),
        (lambda: OwlAllocation(threshold=0.0), "`threshold` expected to be a positive number but got 0"),
        (lambda: OwlAllocation(spread=float("nan")), "`spread` expected to be a positive number but got nan"),
        (lambda: DepthAllocation(float("inf")), "`slope` expected to be a finite number but got inf"),
        *(
            (
                lambda weight=weight: BlockwisePruning(sparsity=0.5, class_token_weight=weight),
                f"`class_token_weight` expected to be a positive number but got {weight}. Leave it out, or give 1",
            )
            for weight in (0.0, -1.0, float("nan"), float("inf"))
        ),
        (lambda: Score(lambda1=float("nan")), "`score.lambda1` expected to be a finite number but got nan"),
        (lambda: Score(scale=-1.0), "`scale` expected to be auto or a positive number but got -1"),
        (lambda: Score(activation_norm="l2"), "`activation_norm` expected to be rms or official but got 'l2'"),
        (
            lambda: BlockwisePruning(sparsity=0.5, method="wanda", diagnostics=Diagnostics(attention_maps=[0])),
            r"`diagnostics.attention_maps` = \[0\] needs attention to be measured",
        ),
    ],
)
def test_wrong_settings_fail_when_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_choices_are_equal_by_their_settings():
    assert AttentionRule(windows=3) == AttentionRule(windows=3) != AttentionRule(windows=4)
    assert repr(FixedRule("k")) == "FixedRule(held='k')"
    assert OwlAllocation(3.0).as_dict() == {"class_path": "OwlAllocation", "init_args": {"threshold": 3.0, "spread": 0.08}}


def test_the_joint_solver_brings_its_own_defaults():
    joint, obs = (BlockwisePruning(sparsity=0.5, solver=solver).settings for solver in ("joint", None))
    assert (joint.target, joint.stages, joint.score.lambda1) == (0.35, True, 30.0)
    assert (obs.target, obs.stages, obs.score.lambda1) == ("pruned", False, 1.0)
    for solver, expected in (("joint", 30.0), (JointSolver("row"), 30.0), ("obs", 1.0), ("admm", 1.0), (None, 1.0)):
        given = Score(scale=4.0, lambda2=0.5)
        score = BlockwisePruning(sparsity=0.5, solver=solver, score=given).settings.score
        assert score == Score(expected, 0.5, 4.0) and given.lambda1 is None
    assert BlockwisePruning(sparsity=0.5, method="d2_wanda", score=Score(scale=4.0)).settings.score.lambda1 == 1.0
    own = BlockwisePruning(sparsity=0.5, solver="joint", target="pruned", stages=False, score=Score(lambda1=2.0)).settings
    assert (own.target, own.stages, own.score.lambda1, own.dense_share) == ("pruned", False, 2.0, 0.0)
