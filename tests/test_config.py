"""The configuration: valid values, refused values, and their error messages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rdm_scale.config import RunConfig, describe_keys, flatten, load_config, parse_config, to_yaml
from rdm_scale.errors import ConfigError

MINIMAL = {"data": {"train": "data/x/manifest.json"}, "run": {"dir": "runs/x"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_sources_are_one_path_or_a_list_with_weights(path: Path) -> None:
    assert [(s.path, s.weight) for s in load_config(path, ["data.train=a"]).data.train] == [("a", 1.0)]
    config = load_config(path, ["data.train=[{path: a, weight: 3}, b]"])
    assert [(s.path, s.weight) for s in config.data.train] == [("a", 3.0), ("b", 1.0)]
    for wrong, said in (
        ("[]", "data.train is empty"),
        ("[{path: a, weight: 0}]", "data.train.0.weight=0"),
        ("[{pth: a}]", "unknown key data.train.0.pth: did you mean data.train.0.path?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_config(path, [f"data.train={wrong}"])


def test_overrides_parse_as_yaml_and_later_ones_win(path: Path) -> None:
    config = load_config(
        path,
        ["train.steps=7", "train.steps=8", "optimizer.lr=1e-3", "data.validation=null", "model.patch_size=[1,4,4]"],
    )
    assert (config.train.steps, config.optimizer.lr, config.data.validation) == (8, 1e-3, ())
    assert config.model.patch_size == (1, 4, 4)


def test_the_resolved_configuration_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["model.depth=5", "sampling.sampler=heun"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=7", "did you mean train.steps?"),
        ("model.gate.multiplyer=2", "did you mean model.gate.multiplier?"),
        ("modle.depth=3", "did you mean model?"),
        ("train.steps=ten", "train.steps"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.steps=1.5", "train.steps=1.5"),
        ("train.steps=true", "train.steps=true"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("model.residual=highway", "'plain', 'rezero', 'layerscale', 'adaln_zero' or 'neural_rdm'"),
        ("train.steps", "write it as key=value"),
        ("model=3", "model"),
        ("train.steps.more=3", "train.steps"),
        ("model.depth={", "not valid YAML"),
        ("model.num_heads=7", "model.num_heads=7 does not divide model.hidden_size=384"),
        ("model.patch_size=[1,3,2]", "model.input.height=32 is not divisible by its model.patch_size entry 3"),
        ("parallel.tensor=4", "parallel.tensor=4 does not divide model.num_heads=6"),
        ("parallel.pipeline=13", "model.depth=12 is less than the 13 chunks of parallel.pipeline=13"),
        ("parallel.sequence=true", "needs parallel.tensor of 2 or more"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4"),
        ("parallel.schedule=zero_bubble", "costs more than the bubble it fills"),
        ("parallel.schedule=gpipe", "'1f1b', 'interleaved_1f1b' or 'v_1f1b'"),
        ("parallel.schedule=v_1f1b", "parallel.schedule=v_1f1b needs parallel.pipeline of 2 or more"),
        ("parallel.chunks=2", "parallel.chunks=2 needs parallel.schedule=interleaved_1f1b or v_1f1b"),
        ("parallel.memory_gib=0", "parallel.memory_gib"),
        ("parallel.recompute=every_1", "parallel.recompute"),
        ("optimizer.betas=[0.9,1.0]", "must lie in [0, 1)"),
        ("optimizer.schedule=cosine", "needs optimizer.schedule_steps"),
        ("train.residual_dtype=bf16", "needs train.precision=bf16"),
        ("train.micro_batch_size=7", "train.global_batch_size=256 is not divisible by train.micro_batch_size=7"),
        ("model.learned_variance=true", "needs diffusion.objective=ddpm"),
        ("sampling.sampler=ddim", "choose euler or heun"),
    ],
)
def test_mistakes_are_reported_with_their_key(path: Path, override: str, words: str) -> None:
    assert words in refusal(path, override)


def test_all_mistakes_are_reported_at_once(path: Path) -> None:
    message = refusal(path, "train.steps=0", "optimizer.lr=-1", "chekpoint.every=3")
    assert "train.steps=0" in message and "optimizer.lr=-1" in message and "did you mean checkpoint?" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: [", "not valid YAML"),
        ("- 1", "must hold sections"),
        ("", "data is missing"),
        ("run: {dir: a}\nrun: {dir: b}\n", "'run' is given twice"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert words in refusal(tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"cannot read the configuration {tmp_path / 'none.yaml'}: No such file" in refusal(tmp_path / "none.yaml")


def test_data_parallel_size_is_the_rest_of_the_world_size(path: Path) -> None:
    config = load_config(path, ["train.global_batch_size=12", "train.micro_batch_size=2"])
    assert [config.data_parallel_size(world) for world in (1, 2, 3, 6)] == [1, 2, 3, 6]
    with pytest.raises(ConfigError, match=r"12 is not divisible by the 5 data-parallel ranks"):
        config.data_parallel_size(5)
    with pytest.raises(
        ConfigError, match=r"a rank's share of the batch, 3 = .* not divisible by train.micro_batch_size=2"
    ):
        config.data_parallel_size(4)


def test_identity_is_model_diffusion_seed_and_batch_only(path: Path) -> None:
    base = load_config(path)
    for same in ("optimizer.lr=1", "train.steps=3", "checkpoint.every=9", "run.dir=elsewhere", "monitor.log_every=1"):
        assert load_config(path, [same]).identity() == base.identity(), same
        assert load_config(path, [same]).digest() != base.digest(), same
    for other in ("model.depth=3", "train.seed=1", "train.global_batch_size=8", "diffusion.condition_dropout=0.2"):
        assert load_config(path, [other]).identity() != base.identity(), other


def test_help_lists_every_key(path: Path) -> None:
    text = describe_keys()
    tree = RunConfig.model_validate(MINIMAL).model_dump()
    for key, _ in flatten(tree):
        assert f"  {key} = " in text
    assert "data.train = required" in text and "[plain, rezero, layerscale, adaln_zero, neural_rdm]" in text


def test_a_configuration_tree_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="the configuration somewhere is not valid"):
        parse_config(MINIMAL | {"surprise": 1}, "somewhere")


def test_reading_a_configuration_imports_nothing_slow() -> None:
    code = (
        "import sys; import rdm_scale.config, rdm_scale.train; "
        "print([m for m in ('torch', 'deepspeed', 'megatron', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configurations_in_the_repository_are_valid(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensor=2", "model.mlp_ratio=1.0027"], "does not divide model.hidden_size * model.mlp_ratio=385"),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "model.patch_size=[1,32,32]"],
            "parallel.tensor=2 does not divide the 1 tokens of a sample",
        ),
        (["parallel.pipeline=2", "parallel.schedule=v_1f1b", "parallel.chunks=3"], "v_1f1b has 2 on every rank"),
        (["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b", "parallel.chunks=1"], "needs 2 or more"),
        (
            ["parallel.pipeline=4", "parallel.schedule=interleaved_1f1b", "parallel.chunks=4"],
            "model.depth=12 is less than the 16 chunks",
        ),
        (["parallel.zero_stage=1", "parallel.keep_gathered=never"], "needs parallel.zero_stage=3"),
        (["parallel.zero_stage=2", "parallel.shard_size=2"], "parallel.shard_size=2 needs parallel.zero_stage=3"),
        (["parallel.offload=optimizer", "parallel.keep_gathered=never"], "parallel.offload=optimizer needs"),
    ],
)
def test_impossible_layouts_are_refused(path: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(path, *overrides)


def test_interleaving_needs_groups_of_micro_batches(path: Path) -> None:
    layout = ["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b", "train.global_batch_size=12"]
    load_config(path, [*layout, "train.micro_batch_size=3"]).data_parallel_size(2)
    with pytest.raises(ConfigError, match=r"multiple of parallel.pipeline=2 micro-batches a step, and there are 3"):
        load_config(path, [*layout, "train.micro_batch_size=4"]).data_parallel_size(2)
