"""The publisher thread: from memory to a durable generation, retention and the ring."""
