"""Ready-made tasks; empty until the first of them is built."""
