"""Messages, the manifest, and their bytes."""
