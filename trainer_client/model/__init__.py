"""Which tensors of a model are streamed, under which names. Nothing is copied here.

- `plan`: the manifest of one model's snapshots, and its live tensors at each of them
- `sources`: which module holds each tensor, and whether the model has been rebuilt since
- `selection`: which part of a model is streamed: patterns of names, or what is trained
- `adapters`: the active adapter of a model with PEFT, under the names of PEFT's files
- `wrappers`: modules wrapped around others (DDP, torch.compile), whose prefixes are dropped from names
- `shards`: what this rank holds of a sharded tensor
- `dtypes`: which kinds of tensors can be streamed, and under which wire dtype
"""
