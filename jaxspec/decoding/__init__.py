"""Decoding as pure functions: requests, the five phases of a round in one loop, whole generations, slots."""
