"""Which of q, k and v keep their weights, and how much of its update each of the others takes: D²Prune's dynamic update.

    attention    per block: the candidate whose attention is nearest to the dense model's (Eq. 12, or the attention's output)
    outlier      per block: the projection with the largest outlier ratio keeps its weights (Eq. 18-19)
    perplexity   all blocks: prune with q, k or v held, keep the run with the lowest loss on held-out windows (Algorithm 1)

A candidate gives each projection a state: `updated` (the solver's mask and update), `held` (D²-Wanda: mask by rows, no update),
or a share of the update on the solver's mask, down to `0`. All states of a projection come from one solve; candidates only
combine them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from callbacks.blockwise.update_rules.probe import AttentionProbe
from functional.pruning import InputStatistics, PruneResult, partial_update
from functional.pruning.attention import outlier_ratio
from lightning_modules.parts.architectures import PrunableLinear

UpdateRule = Literal["fixed", "outlier", "perplexity", "attention"]
Candidates = Literal["single", "all", "partial"]
Objective = Literal["output", "divergence"]

ROLES = ("q", "k", "v")
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
        score: What is minimised.
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
        """none, or the held projections such as q+v, or all three states where a share is among them."""
        if set(self.state.values()) <= {UPDATED, HELD}:
            return "+".join(role for role, state in self.state.items() if state == HELD) or "none"
        return " ".join(f"{role}={state}" for role, state in self.state.items())


@dataclass
class Choice:
    """What was chosen for a block, and from what."""

    best: Candidate
    candidates: list[Candidate]
    results: dict[str, PruneResult]
    """Role -> the chosen result of that projection."""
    map_updated: Tensor
    """Attention map (queries, keys) with all projections updated."""


def states_of(
    updated: PruneResult, held: PruneResult, weight: Tensor, inputs: InputStatistics, candidates: Candidates
) -> dict[str, PruneResult]:
    """Every state of one projection, from its two solves."""
    states = {UPDATED: updated}
    if candidates == "partial":
        states |= {name: partial_update(updated, weight, inputs, share) for name, share in SHARES.items()}
    return states | {HELD: held}


def update_share(state: str) -> float:
    """Share of the weight update that a state takes."""
    return SHARES.get(state, 1.0 if state == UPDATED else 0.0)


def method_of(state: str) -> str:
    """The method that a projection in this state is pruned with."""
    return "d2_wanda" if state == HELD else "d2_sparsegpt"


def subsets(roles: list[str], candidates: Candidates) -> list[State]:
    """Update all first; then each projection held alone (single), or every set of held projections (all)."""
    states = [dict(zip(roles, combination, strict=True)) for combination in product((UPDATED, HELD), repeat=len(roles))]
    return [state for state in states if candidates == "all" or list(state.values()).count(HELD) <= 1]


def descend(options: Mapping[str, list[str]], score: Callable[[State], float]) -> State:
    """Coordinate descent from the first option of every role until no role finds a better one.

    Options are in order, and a role looks at both ends and, from where it is, at its neighbours as long as that helps: the
    error along the share of an update is close to a parabola.

    Args:
        options: Role -> names of its states, in order.
        score: What is minimised; asked again for states that it has seen.
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


class AttentionRule:
    """Chooses by the attention of candidates on the windows of a probe.

    Args:
        candidates: single: none, q, k or v held; all: every subset held; partial: each projection in any state.
        objective: output: the error of the attention's output; divergence: Eq. 12, L_qkv + ρ KL, each relative to its value
            when all projections are updated.
        rho: ρ of the divergence objective.
    """

    def __init__(self, candidates: Candidates, objective: Objective, rho: float) -> None:
        self.candidates, self.objective, self.rho = candidates, objective, rho

    @torch.no_grad()
    def choose(
        self, probe: AttentionProbe, linears: Mapping[str, PrunableLinear], options: Mapping[str, Mapping[str, PruneResult]]
    ) -> Choice:
        """Evaluate candidates in the block that the probe has entered; the weights are afterwards as before.

        Args:
            probe: Has entered the block, whose weights are dense.
            linears: The block's q, k, v linears by role.
            options: Role -> state -> result; `updated` first.
        """
        dense = {role: linear.weight.clone() for role, linear in linears.items()}
        written = dict.fromkeys(options)
        seen: dict[tuple[str, ...], Candidate] = {}
        divergences: dict[tuple[str, ...], float] = {}

        def evaluate(state: State) -> Candidate:
            key = tuple(state.values())
            if key not in seen:
                for role, name in state.items():
                    if written[role] != name:
                        linears[role].weight.copy_(options[role][name].weight)
                        written[role] = name
                pair = tuple(name for role, name in state.items() if role != "v")  # probabilities do not depend on v
                if pair not in divergences:
                    divergences[pair] = probe.divergence()
                error, kl = probe.output_error(), divergences[pair]
                reconstruction = sum(options[role][name].error for role, name in state.items())
                first = next(iter(seen.values()), None)
                score = error if self.objective == "output" else self._divergence_score(kl, reconstruction, first)
                seen[key] = Candidate(dict(state), score, error, kl, reconstruction)
            return seen[key]

        try:
            evaluate({role: UPDATED for role in options})
            map_updated = probe.attention_map()
            if self.candidates == "partial":
                best = descend({role: list(names) for role, names in options.items()}, lambda state: evaluate(state).score)
            else:
                best = min(subsets(list(options), self.candidates), key=lambda state: evaluate(state).score)
        finally:
            for role, weight in dense.items():
                linears[role].weight.copy_(weight)
        results = {role: options[role][name] for role, name in best.items()}
        return Choice(evaluate(best), list(seen.values()), results, map_updated)

    def _divergence_score(self, kl: float, reconstruction: float, updated: Candidate | None) -> float:
        if updated is None:  # this is the candidate that updates all
            return 1.0 + self.rho
        return _relative(reconstruction, updated.reconstruction) + self.rho * _relative(kl, updated.kl)


def _relative(value: float, base: float) -> float:
    if base > 0:
        return value / base
    return 1.0 if value == 0 else float("inf")


def outlier_choice(linears: Mapping[str, PrunableLinear]) -> tuple[str, dict[str, float]]:
    """The role whose dense weight has the largest outlier ratio, and all ratios."""
    ratios = {role: outlier_ratio(linear.weight) for role, linear in linears.items()}
    return max(ratios, key=ratios.get), ratios
