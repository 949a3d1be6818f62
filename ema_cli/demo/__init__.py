"""The whole service at work on real data: a server, a trainer and an evaluation worker, each its own process."""
