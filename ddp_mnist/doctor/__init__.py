"""The command that says what a launch will do here."""
