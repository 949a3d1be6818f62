"""Which tensors of a model are streamed, under which names."""
