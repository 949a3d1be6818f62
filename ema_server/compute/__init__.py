"""Where averages are kept, and the arithmetic on them."""
