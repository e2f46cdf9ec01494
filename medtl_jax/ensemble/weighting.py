"""Weights of the members, one each, 0 or more with sum 1, fitted to labels."""

from collections.abc import Callable

import numpy as np
from scipy import optimize

# Members added one after another by the greedy selection: a weight is a multiple of 1 / 50 or so.
ROUNDS = 50
# It ends after so many of them in a row without a lower loss.
PATIENCE = 10
# A loss is lower if it is so by more than rounding.
_LOWER = 1e-12


def likelihood_weights(likelihood: np.ndarray) -> np.ndarray:
    """Returns the weights `[m]` for which the weighted mean has the lowest NLL.

    The NLL of a mixture is convex in its weights; it is minimised over the simplex by sequential
    quadratic programming (Kraft 1988) from equal weights.

    Args:
      likelihood: `[e, m]`, the probability above 0 that each member gives what is true of e
        entries.
    """

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = likelihood @ weights
        return -np.log(mixed).mean(), -(likelihood / mixed[:, None]).mean(axis=0)

    return _on_simplex(loss, likelihood.shape[1])


def least_squares_weights(members: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns the weights `[m]` for which the weighted mean has the lowest squared error.

    Args:
      members: `[e, m]`, what each member predicts of e numbers.
      target: `[e]`.
    """
    count = members.shape[1]
    errors = members - target[:, None]
    products = errors.T @ errors
    scale = products.mean() or 1.0  # the squared error of equal weights, but for a constant

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        slope = products @ weights / scale
        return float(weights @ slope), 2 * slope

    return _on_simplex(loss, count)


def _on_simplex(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], count: int) -> np.ndarray:
    """The weights `[count]` with the lowest of a convex loss, which also gives its gradient."""
    equal = np.full(count, 1 / count)
    found = optimize.minimize(
        loss,
        equal,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    weights = np.maximum(found.x, 0)
    weights /= weights.sum()
    return weights if loss(weights)[0] < loss(equal)[0] else equal


def greedy_weights(count: int, loss: Callable[[np.ndarray], float]) -> np.ndarray:
    """Returns the weights `[count]` of ensemble selection with replacement (Caruana et al. 2004).

    It begins with the best members, as many as are best together (sorted initialisation), and then
    adds the member that helps most, again and again, up to `ROUNDS` times or until `PATIENCE`
    additions have not helped. The best selection on the way wins; a weight is how often it holds
    the member, divided by its size. Of equal ones the earlier member, and the smaller selection,
    wins.

    Args:
      count: number of members.
      loss: of a weighted mean of the members, from weights `[count]` that sum to 1.
    """
    members = np.eye(count, dtype=np.int64)
    order = np.argsort([loss(member) for member in members], kind="stable")
    selections = np.cumsum(members[order], axis=0)
    best = held = selections[_first_lowest([loss(s / s.sum()) for s in selections])]
    lowest, since = loss(best / best.sum()), 0
    for _ in range(ROUNDS):
        losses = [loss((held + member) / (held.sum() + 1)) for member in members]
        added = _first_lowest(losses)
        held = held + members[added]
        since += 1
        if losses[added] < lowest - _LOWER:
            best, lowest, since = held, losses[added], 0
        if since == PATIENCE:
            break
    return best / best.sum()


def _first_lowest(losses: list[float]) -> int:
    return int(np.argmax(np.asarray(losses) <= min(losses) + _LOWER))
