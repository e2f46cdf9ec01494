"""What a config asks of a training, checked as far as it can be without its data."""

from experiments import study
from experiments.augmentation import check_augmentation
from experiments.domain_settings import check_domain
from medtl_jax.errors import UserError
from medtl_jax.metrics.thresholds import check_sensitivity
from medtl_jax.objectives.pretrain import check_pretrain, needs
from medtl_jax.objectives.task import Task, check_options, check_select
from medtl_jax.training.loop import LoopSettings
from medtl_jax.training.step import Average
from medtl_jax.transfer.groups import FROZEN, assign_stages
from medtl_jax.transfer.norm_policy import check_bn


def group_table(config: dict) -> dict[str, str]:
    """stage -> group, of the network's stages and of the parts that belong to the task."""
    stages = study.architecture(config).stages
    return assign_stages((*stages, *study.new_parts(config)), config["transfer"]["groups"])


def loop_settings(config: dict) -> LoopSettings:
    """How long to train, with what selection."""
    train = config["train"]
    return LoopSettings(
        epochs=train["epochs"],
        min_steps=train["min_steps"],
        batch_size=config["data"]["batch_size"],
        patience=train["patience"],
        select=train["select"],
        seed=config["seed"],
        epoch_steps=train["epoch_steps"],
    )


def average(config: dict, total_steps: int) -> Average:
    """How the states are averaged for evaluation. UserError for two averages at once."""
    train = config["train"]
    start = min(round((1 - train["swa"]) * total_steps), total_steps - 1) if train["swa"] else None
    return Average(train["ema"], start)


def caches(config: dict) -> bool:
    """Whether what the frozen first stages make of the images is kept on disk."""
    return config["transfer"]["cache"] == "prefix"


def check_options_without_data(config: dict) -> None:
    """UserError for what the data need not be read for, which may take minutes."""
    study.check_image_size(config)
    check_sensitivity(config["eval"]["target_sensitivity"])
    check_bn(config["transfer"]["bn"])
    check_augmentation(config)
    check_domain(config)
    average(config, 1)
    if config["task"]:
        check_options(config["task"], config["train"])
        check_select(config["train"]["select"], config["task"])
    if config["task"] == "segment":
        study.check_decoder(config)
    _check_extract(config)
    _check_traditional(config)
    _check_groups(config)
    _check_probe(config)
    _check_source(config)
    _check_cache(config)


def _check_extract(config: dict) -> None:
    """UserError for what is asked of a training, where the network is read as it is."""
    if config["experiment"] != "extract":
        return
    if config["task"] == "segment":
        raise UserError(
            "experiment=extract: a probe or a vote predicts one label an image, not masks; set "
            "experiment=finetune, with the network frozen by transfer.groups if that is meant"
        )
    _refuse_training(config, "extract reads the network as it is")
    if config["model"]["weights"] == "none":
        raise UserError(
            "experiment=extract reads the features of a pretrained network: name model.weights"
        )


def _check_traditional(config: dict) -> None:
    """UserError for what is asked of a network, where there is none."""
    if config["experiment"] != "traditional":
        return
    check_traditional_task(config["task"] or "classify")
    _refuse_training(config, "experiment=traditional has no network")
    for key, usual in (("contrast", "none"), ("in_chans", 0), ("keep_head", False)):
        if config["model"][key] != usual:
            raise UserError(
                f"model.{key}={config['model'][key]} is for a network, and experiment=traditional "
                "has none: leave it out"
            )


def check_traditional_task(name: str) -> None:
    """UserError for a task that traditional classifiers are not for."""
    if name != "classify":
        raise UserError(
            f"experiment=traditional predicts one label an image (classify), not {name}; use "
            "experiment=finetune"
        )


def _refuse_training(config: dict, why: str) -> None:
    """UserError for a setting of a training where there is none."""
    transfer = config["transfer"]
    trains = {
        "transfer.phases": transfer["phases"],
        "transfer.pretrain_loss": transfer["pretrain_loss"] != "none",
        "transfer.probe_first": transfer["probe_first"],
        "transfer.source.name": transfer["source"]["name"],
    }
    for key, asked in trains.items():
        if asked:
            raise UserError(
                f"{key} is for a training, and {why}: leave it out, or use experiment=finetune"
            )


def _check_groups(config: dict) -> None:
    """UserError for stages that would keep values that nothing was learned with."""
    frozen = [stage for stage, group in group_table(config).items() if group == FROZEN]
    if frozen and config["model"]["weights"] == "none":
        raise UserError(
            f"transfer.groups: {', '.join(frozen)} would be frozen at random values, as "
            "model.weights=none; put them into low or high, or name weights"
        )


def _check_probe(config: dict) -> None:
    """UserError for a head that cannot begin as a probe."""
    if not config["transfer"]["probe_first"]:
        return
    if config["task"] == "segment":
        raise UserError("transfer.probe_first: a probe predicts one label an image, not masks")
    if config["model"]["keep_head"]:
        raise UserError(
            "transfer.probe_first puts a probe in the place of the head that model.keep_head "
            "loads; set one of the two to False"
        )
    if config["model"]["weights"] == "none":
        raise UserError(
            "transfer.probe_first: without pretrained weights there is nothing to probe; set "
            "model.weights"
        )


def _check_cache(config: dict) -> None:
    """UserError for settings of the kept maps that do not go together."""
    transfer = config["transfer"]
    if transfer["views"] and not caches(config) and config["experiment"] != "extract":
        raise UserError(
            f"transfer.views={transfer['views']} has no effect with transfer.cache=none; set one "
            "of the two"
        )
    if caches(config) and transfer["phases"]:
        raise UserError(
            "transfer.cache=prefix keeps the maps of one frozen prefix, and transfer.phases thaws "
            "it; leave one of the two out"
        )
    if caches(config) and "source_data" in needs(transfer["pretrain_loss"]):
        raise UserError(
            "transfer.cache=prefix keeps no maps of the source's images, which replay needs; set "
            "transfer.cache=none"
        )


def _check_source(config: dict) -> None:
    """UserError for a source that would be read for nothing, or not at all."""
    transfer = config["transfer"]
    replays = "source_data" in needs(transfer["pretrain_loss"])
    if transfer["source"]["name"] and not replays and not config["eval"]["drift"]:
        raise UserError(
            f"transfer.source.name={transfer['source']['name']} has no effect with "
            "eval.drift=False and without replay: there is nothing to measure; leave one out"
        )
    if transfer["source"]["dir"] and not transfer["source"]["name"]:
        raise UserError(
            f"transfer.source.dir={transfer['source']['dir']} needs transfer.source.name, such as "
            "folder, csv or npz"
        )


def check_retention(config: dict, classifier: Task | None) -> None:
    """UserError for an L_pre that cannot be had; `classifier` is that of the weights, if wanted."""
    transfer, weights = config["transfer"], config["model"]["weights"] != "none"
    check_pretrain(transfer, weights, classifier is not None, bool(transfer["source"]["name"]))
    if transfer["alpha"] and config["model"]["dont_load"]:
        raise UserError(
            f"model.dont_load={config['model']['dont_load']!r} leaves stages at random, and "
            "transfer.alpha holds the stages to what was loaded; set one of the two to nothing"
        )
