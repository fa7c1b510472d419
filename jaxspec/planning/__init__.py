"""What a program needs, from its compiled form and on paper, for devices that need not be here."""
