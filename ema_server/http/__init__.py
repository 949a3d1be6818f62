"""The HTTP application and what surrounds a request."""
