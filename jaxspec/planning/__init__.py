"""Plans for devices that need not be here: the needs of programs, from their compiled form and by formula."""
