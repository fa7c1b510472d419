"""Decoding: requests, rounds of five phases in one loop, whole generations, slots, answers."""
