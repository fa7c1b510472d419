"""Models loaded and put to work: batches, slots, regeneration."""
