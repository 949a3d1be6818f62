"""Averages of checkpoints that lie on disk, without a server: the command `ema average`.

- `errors`: what is refused
- `folders`: which files make a checkpoint, its step, and the order of checkpoints
- `weights`: the weight of each checkpoint in an average, for each rule
- `source`: the tensors of one checkpoint, read block by block, and the digests of its files
- `plan`: whether checkpoints match, and which tensors of which files are averaged
- `combine`: the averages, block by block over all checkpoints
- `output`: the folders that are written, and their provenance
- `average`: from paths and rules to written averages
- `command`: the command line
"""
