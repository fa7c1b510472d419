"""The tree lab: a drafter's acceptance, the cost of a round, and the draft tree that makes the most of both."""
