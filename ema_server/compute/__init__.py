"""Where averages are kept, and the arithmetic on them.

- `accelerator`: averages in memory that the host cannot address
- `arithmetic`: how averages take in the elements of a block
- `backend`: what the server needs of a device that works beside the host
- `compiled`: the averaging arithmetic in loops that numba compiles
- `cuda`: a CUDA device as a `Backend`, and the device that a setting names
- `device`: where averages are kept and computed, as the rest of the server sees it
- `headroom`: how much memory this process may still take before the kernel kills something
- `kernel`: the averaging arithmetic on blocks
- `kernel_choice`: which arithmetic a server computes with, chosen once at its start
- `memory`: the bytes of an average, on whichever device they are, and host memory as torch tenso
- `pool`: threads that share one pass over all averages of a run
- `upload`: brings a snapshot to a device, batch by batch, while the batches before are still bei
"""
