"""Containers that `jax.export` can write into bytes, as arguments and results of a function."""

from jax import export


def serializable(*containers: type) -> None:
    """Registers NamedTuples of jbn's, each once, under the name that they have for users."""
    for container in containers:
        try:
            export.register_namedtuple_serialization(
                container, serialized_name=f"jbn.{container.__name__}"
            )
        except ValueError:  # a module that is loaded a second time, as notebooks do
            continue
