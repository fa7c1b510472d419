"""Acceptance rules: which drafted tokens are kept. Each states the draft modes that it is right for."""

from jaxspec.verify.path import Accepted, follow
from jaxspec.verify.rules import DEFAULT_RULES, RULES, Rule, VerifyInputs, rule_named, simulated

__all__ = ["DEFAULT_RULES", "RULES", "Accepted", "Rule", "VerifyInputs", "follow", "rule_named", "simulated"]
