"""The evaluation worker, and the function it calls."""
