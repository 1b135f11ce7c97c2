"""AttentionRule: choose for each block the states of q, k and v whose attention is nearest to the dense model's (D²Prune §3.2).

A candidate gives each projection a state: `updated` (mask and update of the solver), `held` (D²-Wanda: mask by rows, no
update), or a share of the update with the solver's mask, down to `0`. All states of a projection come from two solves;
candidates only combine them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from callbacks.blockwise.update_rules.base import HELD_METHOD, UPDATE_METHOD, UpdateRule
from callbacks.blockwise.update_rules.probe import AttentionProbe, Reference
from functional.pruning import InputStatistics, PruneResult, measured_against, partial_update
from lightning_modules.parts.architectures import PrunableLinear
from utilities.checks import check_integer, check_one_of

Candidates = Literal["single", "all", "partial"]
Objective = Literal["output", "divergence"]

UPDATED, HELD = "updated", "held"
SHARES = {"0.75": 0.75, "0.5": 0.5, "0.25": 0.25, "0": 0.0}
"""Shares of the update between `updated` and none, by the name of the state."""

State = dict[str, str]
"""Role -> state of that projection."""


@dataclass
class Candidate:
    """One candidate of a block.

    Attributes:
        state: State of each projection.
        score: Objective; lower is better.
        output_error: Σ‖o − o_ref‖² / Σ‖o_ref‖² of the attention's output.
        kl: KL of the attention probabilities from the reference's, nats.
        reconstruction: Σ over the projections of Σ‖(W − Ŵ) x‖² over the calibration tokens (L_qkv of Eq. 12).
    """

    state: State
    score: float
    output_error: float
    kl: float
    reconstruction: float

    @property
    def name(self) -> str:
        """Name of the candidate: none, or its held projections such as q+v, or all three states if one of them is a share."""
        if set(self.state.values()) <= {UPDATED, HELD}:
            return "+".join(role for role, state in self.state.items() if state == HELD) or "none"
        return " ".join(f"{role}={state}" for role, state in self.state.items())


@dataclass
class Selection:
    """The candidate chosen for a block, and all that were evaluated.

    Attributes:
        best: The chosen candidate.
        candidates: All evaluated candidates, in the order of evaluation.
        results: Role -> result of the chosen state.
        map_updated: Attention map (queries, keys) with all projections updated.
    """

    best: Candidate
    candidates: list[Candidate]
    results: dict[str, PruneResult]
    map_updated: Tensor


class AttentionRule(UpdateRule):
    """Choose the states of q, k and v, block by block, by the attention of candidates on a few windows.

    Args:
        candidates: single: none, q, k or v held; all: every subset held; partial: each projection takes the whole update, ¾,
            ½, ¼ or nothing of it, or is held.
        objective: output: error of the attention's output; divergence: Eq. 12, L_qkv + ρ KL, each relative to its value when
            all projections are updated.
        reference: Attention to compare with: model (the dense model on its own hidden states) or block (the dense block on the
            hidden states of the pruned model).
        rho: ρ of objective divergence; 1 when None.
        windows: Number of windows on which attention is measured. Outputs are taken of all windows; probabilities (heads x
            seq_len² x 4 bytes) of the first, or of all with objective divergence.
        source: Another text, or other images, for these windows, in the forms of the data module's `source`; when None, the
            first calibration windows are taken.

    Raises:
        ValueError: If an argument is out of range or does not apply to the objective.
    """

    short = "attention"

    def __init__(
        self,
        candidates: Candidates = "partial",
        objective: Objective = "output",
        reference: Reference = "model",
        rho: float | None = None,
        windows: int = 4,
        source: str | list[str] | None = None,
    ) -> None:
        check_one_of("candidates", candidates, get_args(Candidates))
        check_one_of("objective", objective, get_args(Objective))
        check_one_of("reference", reference, get_args(Reference))
        check_integer("windows", windows, 1)
        if rho is not None and objective != "divergence":
            raise ValueError(
                f"Argument `rho` = {rho} weighs the KL term of `objective: divergence`, but `objective` is {objective!r}. "
                "Leave one of them out."
            )
        if rho is not None and not 0 <= rho < float("inf"):
            raise ValueError(f"Argument `rho` expected to be a number of at least 0 but got {rho}.")
        self.candidates, self.objective, self.reference = candidates, objective, reference
        self.rho = 1.0 if rho is None and objective == "divergence" else rho
        self.windows, self.source = windows, source

    @override
    def holds(self, linears: Mapping[str, PrunableLinear], round_held: str | None) -> tuple[str, ...]:
        """Return no role, since `choose` decides once the block is reached."""
        return ()

    def states_of(
        self, updated: PruneResult, held: PruneResult, weight: Tensor, inputs: InputStatistics, target: Tensor | None = None
    ) -> dict[str, PruneResult]:
        """Make every state of one projection from its two solves. Errors and norms of all belong to one target.

        Args:
            updated: Result with the weight update.
            held: Result without.
            weight: Dense weight, (O, I).
            inputs: Statistics of its inputs.
            target: What the update aims at, (O, I); the dense weight when None.

        Returns:
            State -> result, `updated` first.
        """
        states = {UPDATED: updated}
        if self.candidates == "partial":
            states |= {name: partial_update(updated, weight, inputs, share, target) for name, share in SHARES.items()}
        return states | {HELD: held if target is None else measured_against(held, target, inputs)}

    @torch.no_grad()
    def choose(
        self, probe: AttentionProbe, linears: Mapping[str, PrunableLinear], options: Mapping[str, Mapping[str, PruneResult]]
    ) -> Selection:
        """Evaluate candidates in the block that the probe has entered; the block's weights are restored afterwards.

        Args:
            probe: Probe that has entered the block, whose weights are dense.
            linears: Role -> linear of the block.
            options: Role -> state -> result; `updated` first.

        Returns:
            The best candidate and all others.
        """
        trial = _Trial(self, probe, linears, options)
        try:
            trial.evaluate({role: UPDATED for role in options})
            map_updated = probe.attention_map()
            if self.candidates == "partial":
                best = descend({role: list(names) for role, names in options.items()}, lambda s: trial.evaluate(s).score)
            else:
                best = min(subsets(list(options), self.candidates), key=lambda state: trial.evaluate(state).score)
        finally:
            trial.restore()
        results = {role: options[role][name] for role, name in best.items()}
        return Selection(trial.evaluate(best), trial.candidates, results, map_updated)


class _Trial:
    """Candidates of one block, each written into its weights and measured at most once."""

    def __init__(
        self,
        rule: AttentionRule,
        probe: AttentionProbe,
        linears: Mapping[str, PrunableLinear],
        options: Mapping[str, Mapping[str, PruneResult]],
    ) -> None:
        self._rule, self._probe, self._linears, self._options = rule, probe, linears, options
        self._dense = {role: linear.weight.clone() for role, linear in linears.items()}
        self._written: dict[str, str | None] = dict.fromkeys(options)
        self._seen: dict[tuple[str, ...], Candidate] = {}
        self._divergences: dict[tuple[str, ...], float] = {}

    @property
    def candidates(self) -> list[Candidate]:
        """Candidates in the order of evaluation."""
        return list(self._seen.values())

    def evaluate(self, state: State) -> Candidate:
        """Measure a candidate, unless it has been measured before."""
        key = tuple(state.values())
        if key not in self._seen:
            self._write(state)
            pair = tuple(name for role, name in state.items() if role != "v")  # probabilities do not depend on v
            if pair not in self._divergences:
                self._divergences[pair] = self._probe.divergence()
            error, kl = self._probe.output_error(), self._divergences[pair]
            reconstruction = sum(self._options[role][name].error for role, name in state.items())
            self._seen[key] = Candidate(dict(state), self._score(error, kl, reconstruction), error, kl, reconstruction)
        return self._seen[key]

    def restore(self) -> None:
        """Put the dense weights back."""
        for role, weight in self._dense.items():
            self._linears[role].assign(weight)

    def _write(self, state: State) -> None:
        for role, name in state.items():
            if self._written[role] != name:
                self._linears[role].assign(self._options[role][name].weight)
                self._written[role] = name

    def _score(self, error: float, kl: float, reconstruction: float) -> float:
        if self._rule.objective == "output":
            return error
        updated = next(iter(self._seen.values()), None)  # the candidate that updates all comes first
        if updated is None:
            return 1.0 + self._rule.rho
        return _relative(reconstruction, updated.reconstruction) + self._rule.rho * _relative(kl, updated.kl)


def update_share(state: str) -> float:
    """Return the share of the weight update that a state takes."""
    return SHARES.get(state, 1.0 if state == UPDATED else 0.0)


def method_of(state: str) -> str:
    """Return the method that prunes a projection in a state."""
    return HELD_METHOD if state == HELD else UPDATE_METHOD


def subsets(roles: list[str], candidates: Candidates) -> list[State]:
    """Return the states of all candidates with whole updates, the one that updates all roles first.

    Args:
        roles: Projections.
        candidates: single for at most one held projection, all for every set of held projections.
    """
    states = [dict(zip(roles, combination, strict=True)) for combination in product((UPDATED, HELD), repeat=len(roles))]
    return [state for state in states if candidates == "all" or list(state.values()).count(HELD) <= 1]


def descend(options: Mapping[str, list[str]], score: Callable[[State], float]) -> State:
    """Minimise a score by coordinate descent, from the first option of every role until no role finds a better one.

    A role tries both ends of its ordered options and, from its present option, neighbours as long as they improve: the error
    along the share of an update is close to a parabola.

    Args:
        options: Role -> names of its states, in order.
        score: Function to minimise; may be called again for a state.
    """
    state = {role: names[0] for role, names in options.items()}
    while True:
        before = dict(state)
        for role, names in options.items():
            state[role] = _walk(names, state[role], lambda name, role=role: score(state | {role: name}))
        if state == before:
            return state


def _walk(names: list[str], start: str, score: Callable[[str], float]) -> str:
    best, value = start, score(start)
    for step in (1, -1):
        index = names.index(start) + step
        while 0 <= index < len(names) and score(names[index]) < value:
            best, value, index = names[index], score(names[index]), index + step
    return min((best, names[0], names[-1]), key=score)


def _relative(value: float, base: float) -> float:
    if base > 0:
        return value / base
    return 1.0 if value == 0 else float("inf")
