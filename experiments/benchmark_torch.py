"""The other side of experiments/benchmark.py: torch's models, timed on request.

Started by the benchmark with an interpreter that has torch, torchvision and, for the
EfficientNet-Lites, timm. For each line `MODEL MODE ITERATIONS` on stdin it prints the seconds of
so many iterations, or in one line why there are none; the first line of a model also builds and
warms it up. Modes: `forward` and `train`, of the whole network, and `head`, a training of its last
linear layer behind the frozen others. channels_last, threads and precision as on the command line.
"""

import argparse
import sys
import time
import traceback

import torch


def build(name: str) -> torch.nn.Module:
    """torchvision's (timm's for the Lites) network of this name, without auxiliary heads."""
    if name.startswith("efficientnet_lite"):
        import_torchvision()
        import timm

        return timm.create_model(f"tf_{name}", pretrained=False)
    torchvision = import_torchvision()
    heads = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **heads)


def import_torchvision():
    """torchvision, also beside a torch for which its compiled part was not built.

    Its import stops where the operators of that part are unknown; networks do not need them, so
    they are declared, without a body, and the import tried again.
    """
    import importlib

    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    align = "(Tensor x, Tensor rois, float scale, SymInt h, SymInt w, int ratio, bool aligned)"
    signatures = {"nms": boxes, "qnms": boxes, "roi_align": f"{align} -> Tensor"}
    for name in ("deform_conv2d", "ps_roi_align", "roi_pool", "ps_roi_pool", "_roi_align"):
        signatures.setdefault(name, "(Tensor a) -> Tensor")
        signatures[f"_{name.lstrip('_')}_backward"] = "(Tensor a) -> Tensor"
    for name, signature in signatures.items():
        library.define(name + signature)
    _KEPT.append(library)
    return importlib.import_module("torchvision")


# A library's declarations go with it.
_KEPT: list = []


def freeze(model: torch.nn.Module) -> None:
    """Leaves the last linear layer alone to learn; the others run as in evaluation."""
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        raise ValueError("the network has no linear layer to train as its head")
    model.eval().requires_grad_(False)
    linear[-1].requires_grad_(True)


def make_step(options: argparse.Namespace, name: str, mode: str):
    """A function of no arguments: one forward pass, or one update by SGD with momentum."""
    device = torch.device(options.device)
    model = build(name).to(device, memory_format=torch.channels_last).train(mode == "train")
    if mode == "head":
        freeze(model)
    run = torch.compile(model) if options.compile else model
    shape = (options.batch, 3, options.size, options.size)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    learning = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3, momentum=0.9)

    def forward():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, options.amp):
            run(x)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, options.amp):
            loss = torch.nn.functional.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()

    return forward if mode == "forward" else train


def timed(step, iterations: int, device: str) -> float:
    """Seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Answers the requests on stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    if options.threads:
        torch.set_num_threads(options.threads)
    print(torch.__version__, flush=True)
    current, step = None, None
    for line in sys.stdin:
        name, mode, iterations = line.split()
        try:
            if current != (name, mode):
                # Gives back the memory of the one before.
                current = step = None
                current, step = (name, mode), make_step(options, name, mode)
                timed(step, 3, options.device)
            print(timed(step, int(iterations), options.device), flush=True)
        except Exception as error:  # the benchmark goes on with the next network
            traceback.print_exception(error)
            current = step = None
            what = (str(error).splitlines() or [""])[0]
            print(f"{type(error).__name__}: {what}", flush=True)
        if step is None and options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
