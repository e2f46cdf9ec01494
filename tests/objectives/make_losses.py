"""Writes losses.json: values of PyTorch 2.13, torchvision 0.29 and coral-pytorch 1.4.

Run with these three and NumPy installed: python tests/objectives/make_losses.py
"""

import json
import pathlib

import numpy as np
import torch
import torchvision
from coral_pytorch.dataset import corn_label_from_logits
from coral_pytorch.losses import corn_loss


def gradient(loss, logits):
    """The derivative of `loss` with respect to `logits`, as lists."""
    return torch.autograd.grad(loss, logits)[0].tolist()


def main():
    rng = np.random.default_rng(4)
    functional = torch.nn.functional
    logits = torch.tensor(np.round(rng.normal(0, 2, (6, 4)), 3), requires_grad=True)
    found = {"logits": logits.tolist()}

    present = torch.tensor(rng.integers(0, 2, (6, 4)), dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 3.0, 7.0], dtype=torch.float64)
    bce = functional.binary_cross_entropy_with_logits(logits, present, pos_weight=weights)
    found["present"] = present.int().tolist()
    found["positive_weights"] = weights.tolist()
    found["bce"], found["bce_gradient"] = bce.item(), gradient(bce, logits)
    for gamma in (0.5, 2.0):
        focal = torchvision.ops.sigmoid_focal_loss(
            logits, present, alpha=-1, gamma=gamma, reduction="mean"
        )
        found[f"focal_{gamma}"] = focal.item()
        found[f"focal_{gamma}_gradient"] = gradient(focal, logits)

    wanted = torch.tensor(np.round(rng.normal(0, 2, (6, 4)), 3))
    found["wanted"] = wanted.tolist()
    for delta in (0.5, 1.5):
        loss = functional.huber_loss(logits, wanted, delta=delta)
        found[f"huber_{delta}"], found[f"huber_{delta}_gradient"] = (
            loss.item(),
            gradient(loss, logits),
        )

    ranks = torch.tensor([0, 4, 2, 1, 3, 4])
    loss = corn_loss(logits, ranks, num_classes=5)
    found["ranks"] = ranks.tolist()
    found["corn"], found["corn_gradient"] = loss.item(), gradient(loss, logits)
    found["corn_labels"] = corn_label_from_logits(logits).tolist()

    labels = torch.tensor([0, 3, 2, 1, 3, 0])
    found["labels"] = labels.tolist()
    weighted = functional.cross_entropy(logits, labels, weight=weights)
    found["weighted"], found["weighted_gradient"] = weighted.item(), gradient(weighted, logits)
    # Menon et al. 2021: the cross-entropy of logits + tau log prior.
    prior = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    adjusted = functional.cross_entropy(logits + 1.5 * prior.log(), labels)
    found["prior"], found["adjusted"] = prior.tolist(), adjusted.item()
    found["adjusted_gradient"] = gradient(adjusted, logits)
    # Lin et al. 2017 over a softmax: the usual form with p of the true class.
    p = torch.exp(-functional.cross_entropy(logits, labels, reduction="none"))
    focal = (-((1 - p) ** 2) * p.log()).mean()
    found["softmax_focal"], found["softmax_focal_gradient"] = focal.item(), gradient(focal, logits)

    path = pathlib.Path(__file__).with_name("losses.json")
    path.write_text(
        "{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}\n"
    )


if __name__ == "__main__":
    main()
