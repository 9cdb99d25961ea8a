"""Plan a run: the best layouts of a configuration on GPUs, or the compute-optimal model for a budget.

    python tools/plan.py CONFIG --gpus 64 --device h100 [key=value ...]
    python tools/plan.py --budget 1e21 --law law.json --gpus 256 --days 14

Layouts are ranked by the step time that the measured rates of the device predict (docs/scaling.md); nothing is built
and no GPU is needed. Each is printed as complete overrides for `rdm_scale.train`.
"""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from rdm_scale.config.paths import any_option, local_option
from rdm_scale.errors import ConfigError, RdmError

if TYPE_CHECKING:
    from rdm_scale.scaling.device_rates import DeviceRates
    from rdm_scale.scaling.layout_search import RankedLayout


def main() -> None:
    parser = _parser()
    options = parser.parse_intermixed_args()
    if (options.config is None) == (options.budget is None):
        parser.error("give a configuration, or --budget with --law and --days")
    if options.budget is not None and (options.law is None or options.days is None):
        parser.error("--budget needs --law and --days")
    if options.config is None and options.overrides:
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    try:
        (_layouts if options.budget is None else _budget)(options)
    except RdmError as error:
        sys.exit(f"plan: error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=any_option, help="configuration to find layouts for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the configuration")
    parser.add_argument("--gpus", type=_positive_integer, required=True, help="number of GPUs")
    parser.add_argument("--device", default="h100", help="h100 or h200 (default: h100)")
    parser.add_argument("--top", type=_positive_integer, default=5, help="layouts to print (default: 5)")
    parser.add_argument("--network", type=_positive, metavar="GB/S", help="speed of a GPU's link between nodes, each "
                        "way (default: the device's in rdm_scale/scaling/device_rates.json)")  # fmt: skip
    parser.add_argument("--budget", type=_positive, help="training FLOPs, to be divided between size and samples")
    parser.add_argument("--law", type=local_option, help="law.json of tools/scaling.py fit")
    parser.add_argument("--days", type=_positive, help="days within which the budget has to be spent")
    return parser


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _positive_integer(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")


def _rates(options: argparse.Namespace) -> "DeviceRates":
    from dataclasses import replace

    from rdm_scale.scaling.device_rates import rates_of

    rates = rates_of(options.device)
    return rates if options.network is None else replace(rates, network_gb_per_s=options.network)


def _layouts(options: argparse.Namespace) -> None:
    from rdm_scale import cost
    from rdm_scale.config import load_config
    from rdm_scale.scaling.layout_search import search_layouts

    if wrong := [part for part in options.overrides if "=" not in part]:
        raise ConfigError(f"{wrong[0]} is not key=value")
    rates = _rates(options)
    config = load_config(options.config, options.overrides)
    # The second is always looked for: why it lost is a part of the answer.
    found = search_layouts(config, options.gpus, rates, max(options.top, 2))
    model, batch = config.model, config.train.global_batch_size
    print(
        f"{cost.model_parameters(model).total / 1e9:.3g} B parameters, {model.depth} blocks, {batch} samples a step, "
        f"on {options.gpus} x {options.device} with {rates.memory_gib:g} GiB; predicted, not measured"
    )
    for number, layout in enumerate(found[: options.top], 1):
        print(f"{number}. {' '.join(layout.keys.overrides())}")
        print(f"   {_figures(layout, options.gpus, rates.peak_tflops)}")
    if len(found) > 1:
        print(_why_second(found[0], found[1]))
    if found[0].keys.keep_gathered == "never":
        print(
            "note: ZeRO-3 by block has not been measured on a GPU; compare with a layout that keeps parameters gathered"
        )
    for what in ("tflops, block_s", "node_gpus, node_gb_per_s, network_gb_per_s, latency_s"):
        print(f"rates: {rates.sources[what]}")


def _figures(layout: "RankedLayout", gpus: int, peak_tflops: float) -> str:
    from rdm_scale import cost

    step, train = layout.step, layout.config.train
    flops = 3 * cost.model_flops(layout.config.model) * train.global_batch_size
    hours = train.steps * step.total / 3600
    return (
        f"memory {layout.memory_gib:.1f} GiB; step {step.total:.3f} s = computation {step.computation:.3f} + update "
        f"{step.update:.3f} + bubble {step.bubble:.3f} + communication {step.communication:.3f}; MFU "
        f"{flops / (step.total * gpus * peak_tflops * 1e12):.0%}; {hours * gpus:,.0f} GPU-hours, {hours / 24:,.2f} "
        f"days for {train.steps:,} steps"
    )


def _why_second(first: "RankedLayout", second: "RankedLayout") -> str:
    changes = {part: getattr(second.step, part) - value for part, value in vars(first.step).items()}
    pairs = zip(first.keys.overrides(), second.keys.overrides(), strict=True)
    keys = ", ".join(other for own, other in pairs if own != other)
    parts = ", ".join(
        f"{1e3 * change:+.3g} ms {part}"
        for part, change in sorted(changes.items(), key=lambda each: -abs(each[1]))
        if abs(change) > 1e-6
    )
    behind = second.step.total / first.step.total - 1
    return f"why the second lost ({keys}): {behind:.2%} slower, {parts or 'the same time; the first is simpler'}"


def _budget(options: argparse.Namespace) -> None:
    from rdm_scale.scaling.allocation import optimal_allocation
    from rdm_scale.scaling.guards import prediction_warnings
    from rdm_scale.scaling.law_file import read_law
    from rdm_scale.storage.location import Location

    rates = _rates(options)
    law, _ = read_law(Location(options.law))
    best = optimal_allocation(law.law, options.budget, law.flops)
    size = f"{best.parameters:,.0f} {'blocks' if law.size == 'depth' else 'parameters'}"
    print(f"compute-optimal for {options.budget:.3g} FLOPs: {size}, {best.samples:,.0f} samples, loss {best.loss:.5f}")
    for warning in prediction_warnings(law, best.parameters, best.samples, options.budget):
        print(f"warning: {warning}")
    speed = options.gpus * rates.flops_per_s("none")
    days, most = options.budget / speed / 86_400, speed * options.days * 86_400
    print(
        f"{options.gpus} x {options.device} take at least {days:,.3g} days, {24 * days * options.gpus:,.0f} GPU-hours: "
        f"{'it fits' if days <= options.days else 'it does NOT fit'} into {options.days:g} days, in which they compute "
        f"at most {most:.3g} FLOPs ({rates.tflops['none']:g} TFLOP/s each, as on one GPU; bubbles and communication "
        "come on top: plan the configuration's layouts for them)"
    )
    if days > options.days:
        within = optimal_allocation(law.law, most, law.flops)
        print(f"what fits at best: {within.parameters:,.0f}, {within.samples:,.0f} samples, loss {within.loss:.5f}")


if __name__ == "__main__":
    main()
