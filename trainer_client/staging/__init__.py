"""Copies of a snapshot into a slot of host memory, from the CPU or from a CUDA device.

- `stagers`: chooses the way: one synchronous copy, or one that overlaps training
- `slots`: the host memory that snapshots are copied into, and locking it for a device
- `shared_memory`: memory that a server on the same machine maps too
- `cpu`: the synchronous copy
- `overlapped`: the copy from a CUDA device while training goes on
- `copy_plan`: which way each tensor takes from the device into the slot
- `transfer`: one such copy in progress, and whether it was torn
- `device`: the calls of torch.cuda that all this needs, as an interface
"""
