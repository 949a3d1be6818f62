"""The maths of averaging: decays, weights and windows. Floats only, no tensors."""
