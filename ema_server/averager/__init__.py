"""The one thread that writes averages."""
