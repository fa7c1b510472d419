"""Which drafted tokens are kept: acceptance rules, each for how its candidates were drawn."""

from jaxspec.verify.path import Accepted, follow
from jaxspec.verify.rules import DEFAULT_RULES, RULES, Case, Rule, rule_named, simulated

__all__ = ["DEFAULT_RULES", "RULES", "Accepted", "Case", "Rule", "follow", "rule_named", "simulated"]
