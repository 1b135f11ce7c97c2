"""Update rules of method d2prune: which of q, k and v keep their remaining weights as they are."""

from callbacks.blockwise.update_rules.attention import AttentionRule
from callbacks.blockwise.update_rules.base import ROLES, UpdateRule, UpdateRuleName
from callbacks.blockwise.update_rules.fixed import FixedRule
from callbacks.blockwise.update_rules.outlier import OutlierRule
from callbacks.blockwise.update_rules.perplexity import PerplexityRule

__all__ = ["ROLES", "AttentionRule", "FixedRule", "OutlierRule", "PerplexityRule", "UpdateRule", "UpdateRuleName"]
