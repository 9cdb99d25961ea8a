"""Keys of the configuration that a resumed run has changed, each with what that does."""

from typing import Any

from rdm_scale.config import RunConfig, flatten

# By the beginning of a key, the longest first where several fit. A resume refuses changes of all other keys.
EFFECTS = {
    "checkpoint.start_": "no effect, the run has checkpoints of its own",
    "checkpoint.": "where, when and which checkpoints are saved",
    "data.train": "the same samples, from another place",
    "data.validation": "validation losses before and after are of different samples",
    "data.": "how data are read, not what is trained",
    "monitor.validation_samples": "validation losses before and after are of different samples",
    "monitor.": "what is logged, not what is trained",
    "optimizer.ema_decay": "the EMA weights follow it from this step on",
    "optimizer.": "updates follow it from this step on",
    "parallel.": "how work and memory are divided; losses stay the same up to rounding",
    "run.": "where the run writes",
    "sampling.": "sample grids before and after are drawn differently",
    "train.micro_batch_size": "how a batch is divided; losses stay the same up to rounding",
    "train.steps": "where the run ends",
    "train.": "rounding and speed, from this step on",
}


def changed_keys(config: RunConfig, earlier: object) -> list[str]:
    """One line for each key that differs from the configuration in a checkpoint.

    Args:
        earlier: the configuration in the checkpoint; keys that its version did not have behaved as their defaults.
    """
    defaults = RunConfig.model_validate({"data": {"train": "-"}, "run": {"dir": "-"}})
    then: dict[str, Any] = dict(flatten(defaults.model_dump(mode="json")))
    then |= dict(flatten(earlier)) if isinstance(earlier, dict) else {}
    now = dict(flatten(config.model_dump(mode="json")))
    return [
        f"{key}: {_shown(then.get(key))} before, {_shown(now[key])} now ({_effect(key)})"
        for key in sorted(now)
        if then.get(key) != now[key] and not key.startswith(("model.", "diffusion."))
    ]


def _effect(key: str) -> str:
    fitting = [beginning for beginning in EFFECTS if key.startswith(beginning)]
    return EFFECTS[max(fitting, key=len)] if fitting else "see the description of the key"


def _shown(value: object) -> str:
    """A value as it is written in YAML, except that sources of weight 1 are shown by their paths."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "path" in one for one in value):
        return ", ".join(str(one["path"]) for one in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
