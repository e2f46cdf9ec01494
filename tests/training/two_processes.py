"""A process of two: streams its rows of a set, then process 0 fails while process 1 waits for it.

python two_processes.py PORT PROCESS
"""

import sys

import jax
import numpy as np

from medtl_jax import distributed, process
from medtl_jax.commands import report_mistake
from medtl_jax.data.streams import Streamed
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import LITE
from medtl_jax.models.mobile import EfficientNetLite, StageSpec
from medtl_jax.models.registry import ModelSpec, initialize
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict

ROWS = np.arange(20 * 8 * 8, dtype=np.uint32).astype(np.uint8).reshape(20, 8, 8, 1)


def streamed(read):
    def decode(row):
        read.append(row)
        return ROWS[row]

    return Streamed(range(20), decode, (8, 8, 1))


def predicted(mesh, images):
    stages = (StageSpec(1, 3, 1, 1, 8),)
    model = EfficientNetLite(3, stages=stages, stem_width=8, top_width=8)
    names = ("stem", "stage1", "features")
    spec = ModelSpec("tiny", lambda n: model, names, "head", LITE, 0.99, 8)
    variables = initialize(model, 8, jax.random.key(0))
    return make_predict(model, spec, mesh, 8)(variables, images)


def main(port, number):
    meeting = distributed.Meeting(f"127.0.0.1:{port}", 2, number, wait=100.0)
    with distributed.joined(meeting, report_mistake):
        mesh, read = data_mesh(), []
        assert distributed.spans() and process.is_writer() == (number == 0)
        own = mesh.own_rows(8)
        assert (own.start, own.stop) == (4 * number, 4 * number + 4)
        whole = np.arange(8.0)
        for placed in (mesh.place(whole, mesh.batched), mesh.place_rows(whole[own], 8)):
            assert placed.shape == (8,)
            total = jax.jit(lambda x: (x * x).sum(), out_shardings=mesh.replicated)(placed)
            assert float(total) == 140.0
        logits = predicted(mesh, streamed(read))
        np.testing.assert_allclose(logits, predicted(mesh, ROWS), atol=1e-5)
        # 20 images in batches of 8, the last one padded with the first image.
        batches = np.array([*range(20), 0, 0, 0, 0]).reshape(3, 8)
        assert sorted(read) == sorted(batches[:, own].ravel().tolist()), read
        print(f"process {number} read {len(read)} of 24 rows", flush=True)
        if number == 0:
            raise UserError("this folder is taken")
        distributed.meet()
        raise AssertionError("nobody is there to meet")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
