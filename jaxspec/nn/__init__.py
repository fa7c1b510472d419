"""Parts of a network as pure functions of arrays: attention, rotary positions, MLPs, a decoder layer, the cache."""
