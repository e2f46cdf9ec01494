"""What the tests of the loop look at: what it says, and its records without what they took."""

from medtl_jax.console import Console

COSTS = (
    "seconds",
    "cpu_seconds",
    "images_per_second",
    "compile_seconds",
    "step_bytes",
    "data_bytes",
    "program",
)


class Notes(Console):
    """A console that remembers."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def without_costs(history):
    return [{k: v for k, v in record.items() if k not in COSTS} for record in history]
