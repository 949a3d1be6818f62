"""The copy of a snapshot into a slot, from the CPU or from a CUDA device.

- `copy_plan`: which way each tensor takes from a device into the slot, decided once for a manifest
- `cpu`: the copy of a snapshot into its slot, done when the call returns
- `device`: an accelerator as staging needs it
- `overlapped`: copying a snapshot while training goes on
- `pinned_memory`: slots locked in memory, so that a device writes to them directly while the host does
- `slots`: host memory that snapshots travel in
- `stagers`: which way a snapshot is copied
- `transfer`: one snapshot that is being copied
"""
