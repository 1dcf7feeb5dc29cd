"""Hints to compilers and to JAX's transformations, which change no value."""
