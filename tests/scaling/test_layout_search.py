"""Run planner: step times by hand and against measured rows, the search, and the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.overlap import Link, Part, Sizes, replay
from rdm_scale import cost
from rdm_scale.config import RunConfig, load_config
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.plan import FILLED, plan_parallelism
from rdm_scale.scaling.device_rates import DeviceRates, Network, devices, rates_of
from rdm_scale.scaling.layout_search import even_bubble, search_layouts
from rdm_scale.scaling.predicted_step import LayoutKeys, ModelTotals, ModelWork, data_communication, step_seconds
from tests.scaling.test_law import CHINCHILLA, isoflop_runs
from tools import plan as tool

CONFIGS = Path("configs")
ROUND = DeviceRates(
    memory_gib=80,
    peak_tflops=1000,
    tflops={"none": 500, "selective": 400, "full": 300},
    block_s=1e-4,
    host_block_s=1e-9,
    host_by_block_s=1e-9,
    memory_gb_per_s=1000,
    update_s=1e-11,
    elementwise_share=0.25,
    node_gpus=8,
    node_gb_per_s=200,
    network_gb_per_s=25,
    latency_s=0,
    sources={},
)
PLAIN = LayoutKeys(
    tensor=1,
    sequence=False,
    pipeline=1,
    schedule="1f1b",
    chunks=1,
    zero_stage=3,
    keep_gathered="always",
    overlap=True,
    recompute="none",
    micro_batch=8,
    cuda_graphs=False,
    memory_gib=80,
)


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(str(CONFIGS / f"{name}.yaml"), list(overrides))


def test_step_time_of_one_layout_by_hand() -> None:
    """depth_8b on 16 GPUs: tensor 4 x pipeline 2 x data 2, ZeRO 1, 32 micro-batches of 8 samples on each rank."""
    keys = replace(PLAIN, tensor=4, pipeline=2, zero_stage=1, keep_gathered="auto", recompute="selective")
    config = keys.applied(load("depth_8b"))
    work = ModelWork(config, keys, ROUND, ModelTotals.of(config.model))
    found = step_seconds(work, keys, gpus=16, parameters=1_000_000_000, bubble=0.1)

    # A quarter of the time is not divided by 4: 0.75 / 4 + 0.25. Then 106 blocks, and a pass of 10 bytes a parameter.
    products = 8 * 3 * cost.model_flops(config.model) * 0.4375 / 400e12
    passes = cost.model_parameters(config.model).on_rank(4) * 10 / 1e12
    computed = (products + 106 * 1e-4 + passes) / 2
    # Two branches a block, each gathers and reduces in forward and backward 8 x 1024 tokens of 2048 x 2 bytes.
    tensor = 106 * 2 * 4 * (8 * 1024 * 2048 * 2 * 3 / 4 / 200e9) / 2
    # Data ranks are 4 apart, so that both are in one node; stages are 8 apart and use the network: 4 bytes each way.
    data = 1e9 * (4 + 2) / 2 / 200e9
    messages = 32 * 2 * 8 * 1024 * 2048 * 4 / 25e9
    assert found.computation == pytest.approx(32 * computed)
    assert found.update == pytest.approx(1e9 * 1e-11 / 2)
    assert found.bubble == pytest.approx(32 * (computed + tensor) / 9)  # 10 % of everything: a ninth of the rest
    assert found.communication == pytest.approx(32 * tensor + data + messages)


def test_the_host_bounds_small_micro_batches() -> None:
    config = load("dit_xl")
    slow = replace(ROUND, host_block_s=3e-3)
    work = ModelWork(config, PLAIN, slow, ModelTotals.of(config.model))
    assert work.computation(replace(PLAIN, micro_batch=1)) == pytest.approx(28 * 3e-3)
    assert work.computation(replace(PLAIN, micro_batch=1, cuda_graphs=True)) < 0.012


def test_networks_share_a_node_adapter_by_rank() -> None:
    assert ROUND.network(8, 1).bytes_per_s == 200e9
    assert ROUND.network(64, 1).bytes_per_s == 200e9  # 8 ranks of a node divide 8 x 25 GB/s
    assert ROUND.network(16, 4).bytes_per_s == 50e9
    assert ROUND.network(2, 64).bytes_per_s == 25e9
    assert Network(4, 1e9, 1e-3).seconds(8e9) == pytest.approx(2e-3 + 6)
    assert ROUND.flops_per_s("every_2") == pytest.approx(1e12 / (0.5 / 500 + 0.5 / 300))


@pytest.mark.parametrize("gb_per_s", [5, 50, 500])
def test_exposed_communication_is_that_of_the_replay(gb_per_s: float) -> None:
    """16 equal blocks in 8 buckets of two, as benchmarks/overlap.py replays them."""
    blocks = [Part(0.0005, 0.001, 4_000_000)] * 16
    outside, link = 1_000_000, Link(64, gb_per_s * 1e9, 1e-5)
    replayed = replay([blocks[at : at + 2] for at in range(0, 16, 2)], outside, 3, link, Sizes(2, 4))
    found = data_communication(
        PLAIN,
        load("depth_8b"),
        parameters=65_000_000,
        outside=outside,
        blocks=16,
        forward=0.008,
        backward=0.016,
        micro_batches=3,
        network=Network(*link),
    )
    assert found == pytest.approx(replayed.seconds - replayed.computed_s)


@pytest.mark.parametrize(
    ("row", "config", "batch", "recompute"),
    [
        ("dit_xl 64", "dit_xl", 64, "none"),
        ("dit_xl 64 selective", "dit_xl", 64, "selective"),
        ("dit_xl 64 full", "dit_xl", 64, "full"),
        ("depth_1b 32", "depth_1b", 32, "none"),  # this and the next gave no rate
        ("latte_xl 4", "latte_xl", 4, "none"),
    ],
)
def test_measured_rows_are_predicted(row: str, config: str, batch: int, recompute: str) -> None:
    measured = json.loads(Path("benchmarks/results/gpu.json").read_text())[row]
    keys = replace(PLAIN, micro_batch=batch, recompute=recompute, cuda_graphs=True, overlap=False)
    laid_out = keys.applied(load(config, f"train.global_batch_size={batch}", "train.micro_batch_size=null"))
    work = ModelWork(laid_out, keys, rates_of("h200"), ModelTotals.of(laid_out.model))
    found = step_seconds(work, keys, 1, measured["parameters"], 0.0)
    assert 1e3 * found.total == pytest.approx(measured["step_ms"], rel=0.15)


def test_rates_say_where_they_come_from() -> None:
    for rates in map(rates_of, devices()):
        named = {name.strip() for names in rates.sources for name in names.split(",")}
        assert named == set(vars(rates)) - {"sources"}
    with pytest.raises(ConfigError, match="'b200': choose h100 or h200"):
        rates_of("b200")


@pytest.mark.parametrize(("config", "gpus"), [("depth_3b", 32), ("dit_xl", 8)])
def test_layouts_are_valid_fit_and_are_ranked(config: str, gpus: int) -> None:
    base, rates = load(config), rates_of("h100")
    found = search_layouts(base, gpus, rates, count=6)
    assert len(found) == 6
    totals = [layout.step.total for layout in found]
    assert totals == sorted(totals)
    keys = [[part.split("=")[0] for part in layout.keys.overrides()] for layout in found]
    assert all(each == keys[0] for each in keys)
    assert len({tuple(layout.keys.overrides()) for layout in found}) == 6
    for layout in found:
        parsed = load(config, *layout.keys.overrides())
        assert parsed == layout.config
        plan = plan_parallelism(parsed, gpus, parsed.parallel.memory_gib * 2**30)  # type: ignore[operator]
        assert max(stage.total for stage in plan.stages) <= FILLED * rates.memory_gib * 2**30
        assert plan.keep_gathered == (layout.keys.keep_gathered == "always")


def test_the_search_misses_no_better_layout() -> None:
    """The best by the bounds is the best of all that would be planned."""
    base, rates = load("quickstart", "train.precision=bf16", "train.global_batch_size=8"), rates_of("h100")
    best = search_layouts(base, 4, rates, count=1)[0]
    everything = search_layouts(base, 4, rates, count=10_000)
    assert len(everything) > 100
    assert everything[0].step.total == best.step.total
    assert {layout.keys.pipeline for layout in everything} == {1, 2, 4}
    assert {layout.keys.schedule for layout in everything} == {"1f1b", "interleaved_1f1b", "v_1f1b"}
    assert {layout.keys.recompute for layout in everything} == {"none", "selective", "every_2", "full"}


def test_a_faster_link_never_slows_the_best() -> None:
    rates = rates_of("h100")
    times = [
        search_layouts(load("dit_xl"), 16, replace(rates, network_gb_per_s=speed), count=1)[0].step.total
        for speed in (5, 25, 100)
    ]
    assert times[0] >= times[1] >= times[2]
    assert times[0] > times[2]


@pytest.mark.parametrize(
    ("config", "gpus", "winner", "seconds"),
    [
        ("depth_8b", 64, "tensor=1 pipeline=1 zero_stage=3 keep_gathered=never recompute=selective micro=8", 0.849),
        ("depth_20b", 128, "tensor=1 pipeline=1 zero_stage=3 keep_gathered=never recompute=selective micro=4", 2.293),
    ],
)
def test_winners_of_the_large_configurations(config: str, gpus: int, winner: str, seconds: float) -> None:
    """Regression: change these values where rates change, and the figures of docs/scaling.md with them."""
    best = search_layouts(load(config), gpus, rates_of("h100"), count=1)[0]
    names = ("tensor", "pipeline", "zero_stage", "keep_gathered", "recompute")
    found = " ".join(f"{name}={getattr(best.keys, name)}" for name in names) + f" micro={best.keys.micro_batch}"
    assert found == winner
    assert best.step.total == pytest.approx(seconds, rel=1e-3)


def test_twenty_billion_parameters_on_4096_gpus_take_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of plans, of which the bounds leave a handful."""
    planned = []
    monkeypatch.setattr(
        "rdm_scale.scaling.layout_search.plan_parallelism",
        lambda *arguments: planned.append(0) or plan_parallelism(*arguments),
    )
    assert len(search_layouts(load("depth_20b"), 4096, rates_of("h200"), count=5)) == 5
    assert len(planned) <= 50
    assert even_bubble("1f1b", 4, 1, 12) == pytest.approx(3 / 15)


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    tool.main()


def test_the_command_prints_layouts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_tool(monkeypatch, "configs/dit_xl.yaml", "--gpus", 8, "--device", "h200", "--top", 2, "train.steps=1000")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0.675 B parameters, 28 blocks, 256 samples a step, on 8 x h200")
    layouts = [line.split(". ", 1)[1].split() for line in lines if line[:2] in ("1.", "2.")]
    assert len(layouts) == 2
    load("dit_xl", *layouts[0])
    assert "memory " in lines[2] and "MFU " in lines[2] and "GPU-hours" in lines[2] and "1,000 steps" in lines[2]
    assert any(line.startswith("why the second lost (") for line in lines)
    assert any("nothing has been measured on several GPUs" in line for line in lines)


def test_the_command_divides_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rdm_scale.scaling.law_file import fit_with_intervals, write_law
    from rdm_scale.storage.location import Location

    write_law(Location(tmp_path / "law.json"), fit_with_intervals(isoflop_runs(CHINCHILLA), replicates=2))
    rest = ("--law", tmp_path / "law.json", "--gpus", 256, "--device", "h100")
    run_tool(monkeypatch, "--budget", 1e21, *rest, "--days", 14)
    fits = capsys.readouterr().out
    # 1e21 / (256 x 387e12 FLOP/s) = 10,094 s; 14 days are 1.2e23 FLOPs.
    assert "at least 0.117 days, 718 GPU-hours: it fits into 14 days" in fits and "at most 1.2e+23 FLOPs" in fits
    run_tool(monkeypatch, "--budget", 1e24, *rest, "--days", 14)
    assert "it does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs/quickstart.yaml", "--gpus", 8), "add train.precision=bf16"),
        (("configs/depth_8b.yaml", "--gpus", 2), "no layout of 2 GPUs with 78 GiB is valid and fits"),
        (("configs/depth_8b.yaml", "--gpus", 64, "--device", "b200"), "choose h100 or h200"),
        (("configs/none.yaml", "--gpus", 64), "cannot read the configuration"),
        (("configs/depth_8b.yaml", "--gpus", 64, "depth"), "depth is not key=value"),
        (("configs/depth_8b.yaml", "--gpus", 64, "parallel.shard_size=8"), "no rates for parallel.offload and"),
        (("--budget", 1e21, "--law", "none.json", "--days", 1, "--gpus", 8), "cannot read the law"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, *arguments)
    text = str(stopped.value.code)
    assert text.startswith("plan: error: ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 8), "give a configuration, or --budget"),
        (("--budget", 1e21, "--gpus", 8), "--budget needs --law and --days"),
        (("configs/dit_xl.yaml", "--gpus", "0"), "'0' is not a positive integer"),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
