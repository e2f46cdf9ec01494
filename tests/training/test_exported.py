"""A network as one StableHLO program: its scores are those of the task, and of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.training.exported import PLATFORMS, call_in_batches, export_scores, task_scores
from medtl_jax.training.step import eval_step

TASKS = {
    "classify": Task("classify", ("a", "b", "c")),
    "multilabel": Task("multilabel", ("a", "b", "c")),
    "corn": Task("ordinal", ("low", "middle", "high", "top"), ordinal="corn"),
    "cumulative": Task("ordinal", ("low", "middle", "high", "top"), ordinal="cumulative"),
    "regress": Task("regress", ("x", "y", "z"), mean=(40.0, -3.0, 0.5), std=(17.0, 2.0, 0.1)),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_scores_within_a_program_are_those_of_the_task(task):
    logits = np.random.default_rng(0).normal(0, 6, (50, 3)).astype(np.float32)
    found = jax.jit(lambda x: task_scores(x, task))(logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, task.score(logits), rtol=2e-6, atol=1e-6)


def test_scores_of_pixels_are_those_of_the_task_to_its_halves():
    task = Task("segment", ("background", "lesion"))
    logits = np.random.default_rng(0).normal(0, 4, (2, 5, 5, 2)).astype(np.float16)
    found = jax.jit(lambda x: task_scores(x, task))(logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, task.score(logits).astype(np.float32), atol=5e-4)


@pytest.mark.parametrize("name", ["lenet5_bn", "efficientnet_lite0"])
def test_a_program_read_back_gives_the_network_s_scores(name):
    task = TASKS["classify"]
    model, spec = create_model(name, num_classes=3)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.05, 0.1, leaf.shape).astype(leaf.dtype),
        variable_shapes(model, 32),
    )
    program = export_scores(model, spec, variables, task, (4, 32, 32, 1))
    assert program.platforms == PLATFORMS
    again = jax.export.deserialize(program.serialize())
    images = rng.integers(0, 256, (6, 32, 32, 1), np.uint8)
    logits = eval_step(variables, images, model=model, spec=spec)
    found = call_in_batches(again, images)
    assert found.shape == (6, 3)
    np.testing.assert_allclose(found, task.score(np.asarray(logits)), atol=1e-5)
