"""Registration of containers, so that `jax.export` can serialise functions that use them."""

from jax import export


def serializable(*containers: type) -> None:
    """Registers NamedTuples of jbn under their public names."""
    for container in containers:
        try:
            export.register_namedtuple_serialization(
                container, serialized_name=f"jbn.{container.__name__}"
            )
        except ValueError:  # registered before: notebooks load a module a second time
            continue
