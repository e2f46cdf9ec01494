"""The steps that the benchmarks time: networks, what they read, and the parts of a training step.

Images, labels, weights and activations are drawn at random: the values change no time.
"""

import dataclasses
import functools
import math

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import Timed, compile_step

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.settings import default_section
from medtl_jax.augment.policy import Augment, make_augment
from medtl_jax.models.registry import (
    ModelSpec,
    Variables,
    create_model,
    initialize,
    variable_shapes,
)
from medtl_jax.objectives.task import cross_entropy
from medtl_jax.training.step import Average, StepParts, Term, create_state, train_step
from medtl_jax.transfer.features import activations
from medtl_jax.transfer.groups import FROZEN, HIGH, LOW, label_tree
from medtl_jax.transfer.optim import make_optimizer, make_schedules
from medtl_jax.weights.adapt import adapted_input

FORWARD, TRAIN = "forward", "train"
# Of the networks that are timed beside torch's, which have ImageNet's head.
_IMAGENET_CLASSES = 1000
# Of the steps that are made as `finetune` makes them.
CLASSES = 2
# Batches on the device, so that a step's rows do not lie side by side.
BATCHES = 4
# Only the shape of the learning rate's schedule depends on them.
_TOTAL_STEPS, _STEPS_PER_EPOCH = 1000, 100


def random_images(count: int, size: int, channels: int = 3) -> np.ndarray:
    """uint8 `[count, size, size, channels]`."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


def forward_pass(name: str, batch: int, size: int, dtype: str) -> Timed:
    """The forward pass of a network in evaluation, compiled and warmed up."""
    model, _ = create_model(name, _IMAGENET_CLASSES, dtype=jnp.dtype(dtype))
    variables = initialize(model, size, jax.random.key(0))
    image = jnp.asarray(random_images(batch, size), jnp.float32) / 128 - 1
    return compile_step(lambda _, *given: (None, model.apply(*given)[0]), None, variables, image)


def training_step(
    name: str, batch: int, size: int, dtype: str, augment: Augment | None = None, channels: int = 3
) -> Timed:
    """The train step of a network with all stages in training, compiled and warmed up.

    Images are uint8 and normalised on the device; SGD with momentum.
    """
    model, spec = create_model(name, _IMAGENET_CLASSES, channels, dtype=jnp.dtype(dtype))
    spec = dataclasses.replace(spec, input=adapted_input(spec.input, channels))
    variables = initialize(model, size, jax.random.key(0))
    table = dict.fromkeys((*spec.stages, spec.head), HIGH)
    parts = StepParts(
        model=model,
        spec=spec,
        optimizer=optax.sgd(1e-3, momentum=0.9),
        table=table,
        labels=label_tree(variables["params"], table),
        terms=(_loss(_IMAGENET_CLASSES),),
        augment=augment or make_augment({}),
    )
    given = {
        "image": jnp.asarray(random_images(batch, size, channels)),
        "target": jnp.arange(batch, dtype=jnp.int32) % _IMAGENET_CLASSES,
    }
    step = functools.partial(train_step, parts=parts)
    return compile_step(step, create_state(variables, parts), given, jax.random.key(0))


def _loss(classes: int) -> Term:
    return Term("new", 1.0, cross_entropy(np.ones(classes, np.float32), 0.0))


def finetune_network(name: str, dtype: str = "float32") -> tuple[nn.Module, ModelSpec]:
    """The network as `finetune` makes it by default."""
    momentum = default_section("transfer")["bn"]["momentum"]
    drop_path = default_section("model")["drop_path"]
    settings = {"momentum": momentum, "drop_path": drop_path, "dtype": jnp.dtype(dtype)}
    return create_model(name, CLASSES, **settings)


def groups_until(spec: ModelSpec, first: str) -> dict[str, str]:
    """stage -> group: what comes before the part `first` is frozen, the head is in `high`."""
    parts = (*spec.stages, spec.head)
    place = parts.index(first)
    table = {part: FROZEN if i < place else LOW for i, part in enumerate(parts)}
    return {**table, spec.head: HIGH}


def finetune_parts(
    model: nn.Module, spec: ModelSpec, params: dict, table: dict[str, str], start: str
) -> StepParts:
    """The parts of a step with the defaults of `finetune`, without augmentation."""
    optim, labels = default_section("optim"), label_tree(params, table)
    schedules = make_schedules(optim, set(table.values()), _TOTAL_STEPS, _STEPS_PER_EPOCH)
    return StepParts(
        model=model,
        spec=spec,
        optimizer=make_optimizer(optim, labels, schedules, new=(spec.head,)),
        table=table,
        labels=labels,
        terms=(_loss(CLASSES),),
        augment=make_augment({}),
        average=Average(default_section("train")["ema"]),
        start=start,
    )


def examples(
    model: nn.Module, spec: ModelSpec, image_size: int, batch: int, start: str
) -> dict[str, np.ndarray]:
    """`BATCHES` batches: uint8 images, or float32 activations for the part `start`."""
    count = BATCHES * batch
    target = np.arange(count, dtype=np.int32) % CLASSES
    if not start:
        return {"image": random_images(count, image_size, model.in_chans), "target": target}
    shape = (count, image_size, image_size, model.in_chans)
    run = functools.partial(activations, model=model, spec=spec, start=start)
    shapes = variable_shapes(model, image_size)
    found = jax.eval_shape(run, shapes, jax.ShapeDtypeStruct(shape, jnp.uint8))
    image = np.random.default_rng(0).uniform(0, 1, found.shape).astype(np.float32)
    return {"image": image, "target": target}


def drawn(shapes: Variables) -> Variables:
    """Variables of these shapes: kernels by He et al. (2015), ones elsewhere."""
    draw = np.random.default_rng(0)

    def leaf(shape) -> np.ndarray:
        if len(shape.shape) < 2:
            return np.ones(shape.shape, shape.dtype)
        deviation = math.sqrt(2 / math.prod(shape.shape[:-1]))
        return draw.normal(0, deviation, shape.shape).astype(shape.dtype)

    return jax.tree.map(leaf, shapes)
