"""Methods of adaptation by name: each is a few settings of `config.domain`, over the same step.

Losses may be added up, as in `cdan_e+mcc` or `dann+0.1*entropy`; what adds a loss may be written
with another peak of lambda than `domain.strength`, as in `dann@0.3`. What else the section `domain`
says holds for all of them.
"""

import math

from experiments.strategies import Strategy
from medtl_jax.domain.methods import parse_method
from medtl_jax.errors import UserError

SOURCE, SUPERVISED = "source", "supervised"
"""The two bounds: nothing of the target is trained on; the target's labels are."""

_METHOD, _BN, _STRENGTH = "domain.method", "domain.bn", "domain.strength"


def _statistics(summary: str, kind: str) -> Strategy:
    """What the target's images meet in batch norms, and no loss of its own."""
    return Strategy(summary, {_METHOD: "none", _BN: kind})


def _loss(summary: str, name: str) -> Strategy:
    return Strategy(summary, {_METHOD: name})


METHODS = {
    SOURCE: _statistics("no adaptation: trained on the source alone", "source"),
    "adabn": _statistics(
        "trained on the source; batch statistics of the target's images for the target (AdaBN, Li "
        "et al. 2016)",
        "adabn",
    ),
    "dsbn": _statistics(
        "trained on the source, with batch statistics of each domain's own (domain-specific batch "
        "norm, Chang et al. 2019)",
        "own",
    ),
    "dann": _loss(
        "features that a discriminator cannot tell apart (DANN, Ganin et al. 2016)", "dann"
    ),
    "cdan": _loss(
        "features and answers together, against a discriminator (CDAN, Long et al. 2018)", "cdan"
    ),
    "cdan_e": _loss("CDAN with weights by the entropy of the answers (CDAN+E)", "cdan_e"),
    "mmd": _loss(
        "equal mean embeddings of the features under several kernels (DAN, Long et al. 2015)", "mmd"
    ),
    "coral": _loss("equal covariances of the features (deep CORAL, Sun & Saenko 2016)", "coral"),
    "mcc": _loss("answers that confuse no classes (MCC, Jin et al. 2020)", "mcc"),
    "entropy": _loss(
        "certain answers on the target (entropy minimisation, Grandvalet & Bengio 2004)", "entropy"
    ),
}
SUPERVISED_SUMMARY = "trained on the target's own training images with their labels"


def find_method(text: str) -> Strategy:
    """The method that `text`, of `config.adapt.methods`, names: `name` or `name@strength`.

    In the place of a name may stand a sum of losses, in the grammar of `domain.method`.

    Raises:
      UserError: no such method, one without a strength, or a strength that is no positive number.
    """
    name, at, strength = text.partition("@")
    if name == SUPERVISED:
        raise UserError(
            "adapt.methods: supervised trains with the target's labels and is no method to be "
            "picked: leave it out, adapt.supervised=True trains it beside them"
        )
    method = METHODS.get(name) or _sum_of_losses(name, text)
    if not at:
        return method
    if method.settings[_METHOD] == "none":
        able = [one for one, other in METHODS.items() if other.settings[_METHOD] != "none"]
        raise UserError(
            f"adapt.methods={text!r}: {name} has no strength; those that have: {', '.join(able)}"
        )
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(
            f"adapt.methods={text!r}: {strength!r} must be a positive number, as in {name}@0.3"
        )
    return Strategy(f"{method.summary}; strength {value:g}", {**method.settings, _STRENGTH: value})


def _sum_of_losses(name: str, text: str) -> Strategy:
    """The method `name`, of several losses; UserError for what is no sum of them."""
    if not {"+", "*"} & set(name):
        raise UserError(
            f"adapt.methods={text!r} is not known; choose from {', '.join(METHODS)}, or add up "
            "losses as in cdan_e+mcc"
        )
    try:
        losses = parse_method(name)
    except UserError as error:
        raise UserError(str(error).replace("domain.method", "adapt.methods")) from error
    parts = [loss if factor == 1 else f"{factor:g}*{loss}" for factor, loss in losses]
    return _loss(f"the losses of {' and '.join(loss for _, loss in losses)}", " + ".join(parts))
