"""The copy of a snapshot into a slot, from the CPU or from a CUDA device."""
