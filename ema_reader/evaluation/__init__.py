"""The evaluation worker, and the function it calls.

- `batchnorm`: batchNorm statistics anew
- `user_function`: the user's functions
- `worker`: the evaluation worker
"""
