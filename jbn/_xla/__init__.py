"""What is there for a compiler or for JAX's transformations, and not for the mathematics."""
