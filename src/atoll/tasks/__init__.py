"""Ready-made tasks. Their libraries are loaded when they are used."""

from atoll.tasks.causal import CausalLM

__all__ = ["CausalLM"]
