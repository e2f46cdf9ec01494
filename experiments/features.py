"""Features of the frozen network, kept on disk, and a linear probe of them as its head."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from experiments.augmentation import say_augmentation
from experiments.study import Fitted, Request
from medtl_jax.augment.policy import drawing_settings, make_augment
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.models.backbone import HEAD
from medtl_jax.training.devices import DataMesh
from medtl_jax.transfer.feature_cache import default_cache_folder
from medtl_jax.transfer.features import cached_activations
from medtl_jax.transfer.probe import LinearProbe, fit_linear


def kept_activations(
    request: Request, fitted: Fitted, split: Split, start: str, mesh: DataMesh, views: int = 0
) -> np.memmap:
    """What the network reads at `start` of the images of a split, from the cache on disk.

    float32 `[max(views, 1) * n, ...]`, see `features.cached_activations`.
    """
    config = request.config
    with request.console.progress("features") as advance:
        return cached_activations(
            default_cache_folder(config["transfer"]["cache_dir"]),
            fitted.network,
            fitted.spec,
            fitted.variables,
            split,
            start,
            mesh=mesh,
            batch_size=config["eval"]["batch_size"],
            views=views,
            augment=make_augment(config["augment"]),
            augment_settings=drawing_settings(config["augment"]),
            seed=config["seed"],
            note=request.console.note,
            advance=advance,
            took=request.effort.add,
        )


def probed_features(request: Request, fitted: Fitted, dataset: Dataset, mesh: DataMesh):
    """`(features, target)` of the training and of the validation images.

    With `transfer.views` each training image is there as often, differently augmented.
    """
    train, val = dataset.splits["train"], dataset.splits["val"]
    if request.config["experiment"] == "extract" and request.config["transfer"]["views"]:
        say_augmentation(request.config, request.console)
    views = request.config["transfer"]["views"]
    kept = kept_activations(request, fitted, train, HEAD, mesh, views)
    target = np.concatenate([train.target] * max(views, 1))
    return (kept, target), (kept_activations(request, fitted, val, HEAD, mesh), val.target)


def linear_probe(request: Request, fitted: Fitted, dataset: Dataset, mesh: DataMesh) -> LinearProbe:
    """The linear classifier, or regression, of the features, its penalty chosen by validation."""
    (train, target), (val, val_target) = probed_features(request, fitted, dataset, mesh)
    with request.console.progress("probe") as advance, request.effort.measured():
        return fit_linear(
            fitted.task,
            train,
            target,
            val,
            val_target,
            advance=lambda done, total: advance(done, total, ""),
        )


def with_head(fitted: Fitted, probe: LinearProbe) -> Fitted:
    """The network with the probe as its head (LP-FT: Kumar et al. 2022)."""
    head = {"kernel": jnp.asarray(probe.kernel), "bias": jnp.asarray(probe.bias)}
    params = {**fitted.variables["params"], HEAD: head}
    return dataclasses.replace(fitted, variables={**fitted.variables, "params": params})
