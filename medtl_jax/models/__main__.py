"""Lists the models: python -m medtl_jax.models

For each its parameters with 1000 classes, the smallest image in pixels, where `imagenet` weights
come from, and the stages that `transfer.groups` names.
"""

import math
import sys
from collections.abc import Sequence

import jax

from medtl_jax.commands import Parser, run_tool
from medtl_jax.models.registry import create_model, list_models, model_spec, variable_shapes
from medtl_jax.weights.sources import SOURCES, PackageSource


def main(arguments: Sequence[str]) -> None:
    """Prints two lines, or three with auxiliary heads, for each model."""
    Parser(prog="python -m medtl_jax.models", description=__doc__.partition("\n")[0]).parse_args(
        arguments
    )
    width = max(map(len, list_models()))
    print(f"{'model':{width}}  {'parameters':>11}  {'pixels':>6}  imagenet")
    for name in list_models():
        spec = model_spec(name)
        size = spec.smallest_input
        print(f"{name:{width}}  {parameters(name):11,}  {size:6}  {origin(name)}")
        print(f"{'':{width}}  {' '.join((*spec.stages, spec.head))}")
        if spec.auxiliary:
            heads = " ".join(spec.auxiliary)
            print(
                f"{'':{width}}  {heads} with model.auxiliary, from {spec.smallest_auxiliary} pixels"
            )


def parameters(name: str) -> int:
    """Number of trainable values of a model with 1000 classes, without auxiliary heads."""
    model, spec = create_model(name, 1000)
    shapes = variable_shapes(model, spec.smallest_input)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def origin(name: str) -> str:
    """The package or the address behind `model.weights=imagenet`, `-` where there is none."""
    source = SOURCES.get(name)
    if source is None:
        return "-"
    return f"pip: {source.package}" if isinstance(source, PackageSource) else source.url


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
