"""Start of a run, and refusal to overwrite another one. (Resuming from checkpoints: tests/distributed.)."""

import errno
import fcntl
import json
from pathlib import Path

import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, to_yaml
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.errors import CheckpointError, ConfigError, OwnershipError
from rdm_scale.training.run_directory import Start, plan_start, prepare, refuse_other_identity


def config_in(path: Path, **sections: dict) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "x"}, "run": {"dir": str(path / "run")}} | sections)


def start(config: RunConfig) -> Start:
    return plan_start(config, DataFacts({}, CodecRecord(name="identity", location="identity"), ()))


def test_a_new_directory_starts_at_step_0_and_planning_writes_nothing(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    assert start(config) == Start(0, None)
    assert list(tmp_path.iterdir()) == []
    prepare(config, Start())
    assert (tmp_path / "run" / "config.yaml").read_text() == to_yaml(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["owner.json"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prepare(config, Start())
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert start(config) == Start(0, None)
    prepare(config, Start())
    assert metrics.read_text() == ""


@pytest.mark.parametrize("step", [0, 1, 3])
def test_metrics_are_truncated_to_the_step_of_the_resume(tmp_path: Path, step: int) -> None:
    config = config_in(tmp_path)
    prepare(config, Start())
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4')
    prepare(config, Start(step, "somewhere"))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, step + 1))


def test_a_damaged_line_costs_that_line_and_never_a_resume(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prepare(config, Start()).close()
    odd = [b'{"step": 2, "lo', b"[3]", b'{"step": "3"}', b'{"loss": 1.0}', b"\xff\x00", b'{"step": null}']
    sound = [json.dumps({"step": step}).encode() for step in range(1, 7)]
    mixed = [line for pair in zip(sound, odd, strict=True) for line in pair]
    for name in ("metrics.jsonl", "depth.jsonl"):
        (tmp_path / "run" / name).write_bytes(b"\n".join(mixed) + b"\n" + b'{"step": 7')
    with prepare(config, Start(5, "somewhere")) as held:
        assert len(held.warnings) == 2 and "6 of 12 lines are left out" in held.warnings[0]
    for name in ("metrics.jsonl", "depth.jsonl"):
        assert (tmp_path / "run" / name).read_bytes().splitlines() == sound[:5]


def test_metrics_survive_a_run_that_begins_again(tmp_path: Path) -> None:
    """The checkpoints may be on a disk that is not mounted: what was measured is not theirs to take along."""
    config = config_in(tmp_path)
    prepare(config, Start()).close()
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 4))
    (tmp_path / "run/metrics.jsonl").write_text(lines)
    with prepare(config, Start()) as held:
        assert held.warnings == [
            f"the run begins again at step 0: the 3 lines of metrics.jsonl are in {tmp_path}/run/metrics.before.jsonl"
        ]
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert (tmp_path / "run/metrics.before.jsonl").read_text() == lines


def test_the_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    prepare(config_in(tmp_path), Start())
    with pytest.raises(ConfigError, match=r"(?s)belongs to another run.*model\.depth: 12 there, 3 here"):
        start(config_in(tmp_path, model={"depth": 3}))
    with pytest.raises(ConfigError, match=r"holds a run already and checkpoint\.resume=never"):
        start(config_in(tmp_path, checkpoint={"resume": "never"}))


def test_keys_missing_in_an_older_checkpoint_have_their_defaults() -> None:
    """A version without a key behaved as with the default of that key."""
    config = RunConfig.model_validate({"data": {"train": "none"}, "run": {"dir": "none"}})
    missing = {"model.base_depth", "model.qk_norm"}
    older = {name: value for name, value in config.identity().items() if name not in missing}
    refuse_other_identity(config.identity(), older, "the checkpoint")
    based = config.model_copy(update={"model": config.model.model_copy(update={"base_depth": 3})})
    with pytest.raises(ConfigError, match=r"model\.base_depth: None there, 3 here"):
        refuse_other_identity(based.identity(), older, "the checkpoint")


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl but no config\.yaml"):
        start(config_in(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a directory"):
        start(config_in(tmp_path, run={"dir": str(tmp_path / "file")}))


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a complete checkpoint nor a run.*use checkpoint\.start_from"):
        start(config_in(tmp_path, checkpoint={"resume": str(tmp_path / "none")}))


def test_directories_that_cannot_be_written_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write to run\.dir=/proc/x"):
        prepare(config_in(tmp_path, run={"dir": "/proc/x"}), Start())
    with pytest.raises(ConfigError, match="cannot write checkpoints to /proc/x"):
        prepare(config_in(tmp_path, checkpoint={"dir": "/proc/x"}), Start())


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_implemented(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    prepare(config_in(tmp_path), Start()).close()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with (
        prepare(config, Start()),
        pytest.raises(ConfigError, match=r"is in use by a run that is alive \(process \d+ on"),
    ):
        prepare(config, Start())
    prepare(config, Start()).close()


def run_id(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["id"]


def test_two_runs_do_not_share_their_checkpoints(tmp_path: Path) -> None:
    """The same run takes its place at once; another is refused, before and after the first has ended."""
    shared = {"dir": str(tmp_path / "checkpoints")}
    first = config_in(tmp_path / "a", checkpoint=shared)
    second = config_in(tmp_path / "b", checkpoint=shared)
    with prepare(first, start(first)):
        with pytest.raises(OwnershipError, match=r"belong to the run in \S+/a/run .*may be alive"):
            start(second)
        with pytest.raises(OwnershipError, match="belong to the run in"):
            prepare(second, Start())
    with pytest.raises(OwnershipError, match="that run has ended"):
        start(second)
    prepare(first, start(first)).close()
    asked = config_in(tmp_path / "b", checkpoint=shared | {"take_over": True})
    prepare(asked, start(asked)).close()
    prepare(second, start(second)).close()
    with pytest.raises(OwnershipError, match=r"belong to the run in \S+/b/run"):
        start(first)
    assert run_id(tmp_path / "a" / "run") != run_id(tmp_path / "b" / "run")


def test_a_configuration_that_no_run_wrote_is_not_replaced(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    own = tmp_path / "run" / "config.yaml"
    own.parent.mkdir()
    own.write_text(f"# by hand\n{to_yaml(config)}")
    with pytest.raises(ConfigError, match=r"holds a config.yaml that no run wrote, and a run would replace it"):
        start(config)
    assert own.read_text().startswith("# by hand") and list(own.parent.iterdir()) == [own]


def test_a_run_without_an_id_gets_one_and_keeps_it(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prepare(config, start(config)).close()
    for left in ("run.json", "checkpoints/owner.json"):  # as before ids were written
        (tmp_path / "run" / left).unlink()
    prepare(config, start(config)).close()
    given = run_id(tmp_path / "run")
    prepare(config, start(config)).close()
    assert run_id(tmp_path / "run") == given
