"""The trainer's end of the protocol."""
