"""Where averages are kept, and the arithmetic on them.

- `memory`: host memory as torch tensor and memoryview at once, and how much of it is left
- `device`: what the server needs of the place where averages are kept; the host is one
- `backend`: what the server needs of a device that works beside the host: memory and streams
- `upload`: brings a snapshot to such a device, in two stages
- `accelerator`: averages on such a device
- `cuda`: a CUDA device as a backend
- `arithmetic`: how averages take in a block of elements, by torch
- `compiled`: the same arithmetic in loops that numba compiles
- `checked`: such a loop that finds NaN and Inf in the same pass, and writes elsewhere
- `select`: chooses between these two
- `kernel`: one thread's pass over the blocks of a snapshot
- `pool`: the threads that share a pass
"""
