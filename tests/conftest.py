"""A hostile environment for the tests: four devices, strict dtypes, warnings as errors.

Four CPU devices make every mesh a real one; strict promotion turns a silent change of dtype into
an error. Compiled programs are kept between runs: the cache is keyed by XLA on the program, its
options and the machine, so a stale entry is never used.
"""

import collections
import os
import pathlib
import tempfile
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import hypothesis
import jax
import pytest

from medtl_jax.models import inputs
from medtl_jax.models.mobile import EfficientNetLite, StageSpec
from medtl_jax.models.registry import ModelSpec

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("MEDTL_JAX_TEST_DEVICES", "4")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The arithmetic is under test, not the machine code: without LLVM's optimisation programs compile
# in half the time, which is most of what the tests take. XLA's own passes stay as they are.
jax.config.update("jax_disable_most_optimizations", True)

# The time of an example is mostly XLA's compilation, which says nothing about the code.
hypothesis.settings.register_profile("medtl_jax", deadline=None)
hypothesis.settings.load_profile("medtl_jax")

SHARED = pathlib.Path(__file__).resolve().parents[1] / ".." / "shared"


def _compilation_cache() -> pathlib.Path | None:
    """A folder of this user's alone, or None: programs that others wrote are not to be run."""
    if not hasattr(os, "getuid"):
        return None
    folder = (
        pathlib.Path(tempfile.gettempdir()) / f"medtl_jax-tests-{os.getuid()}-{jax.__version__}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    private = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if private and not folder.is_symlink() else None


if (_cache := _compilation_cache()) is not None:
    jax.config.update("jax_compilation_cache_dir", str(_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow cases come first: for one that a worker began last all others would wait."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with reference logits and real images beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with the reference files is not beside this checkout")
    return SHARED


@pytest.fixture
def optax_promotion():
    """Standard promotion: Adam's bias correction and optax's schedules mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def compilation_cache() -> str | None:
    """Where compiled programs are kept, for the processes that a test starts."""
    return jax.config.jax_compilation_cache_dir


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., tuple[nn.Module, ModelSpec]]:
    """`make(num_classes, **fields) -> (model, spec)`: the real module with two small stages."""

    def build(num_classes: int, **fields) -> nn.Module:
        stages = (StageSpec(1, 3, 1, 1, 8), StageSpec(1, 3, 2, 2, 8))
        return EfficientNetLite(num_classes, stages=stages, stem_width=8, top_width=16, **fields)

    spec = ModelSpec(
        name="tiny",
        build=build,
        stages=("stem", "stage1", "stage2", "features"),
        head="head",
        input=inputs.LITE,
        norm_momentum=0.99,
        smallest_input=8,
    )
    return lambda num_classes=3, **fields: (build(num_classes, **fields), spec)
