"""Drafters measured and compared: acceptance, timing, equality of texts, statistics, figures."""
