"""Every file in configs/ can be started as it is: it loads, and fits the GPUs that it names."""

import re
from pathlib import Path

import pytest

from rdm_scale import cost
from rdm_scale.config import load_config
from rdm_scale.parallel.plan import plan_parallelism

FILES = sorted(Path("configs").glob("*.yaml"))
BILLIONS = {"depth_1b": 1.0, "depth_3b": 3.1, "depth_8b": 8.0, "depth_20b": 20.1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_fits_the_gpus_that_it_names(path: Path) -> None:
    config = load_config(path)
    stated = re.search(r"^# For (\d+) GPUs of (\d+) GB", path.read_text(), re.MULTILINE)
    if stated is None:
        assert path.stem in ("quickstart", "quickstart_video", "digits_text")  # for any machine
        plan_parallelism(config, 1, None)
        return
    world, memory = map(int, stated.groups())
    assert config.parallel.memory_gib == memory
    layout = plan_parallelism(config, world, memory * 2**30)
    assert "warning" not in layout.table(config)
    assert max(stage.total for stage in layout.stages) < 0.9 * memory * 2**30
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", BILLIONS)
def test_depth_scaled_models_have_the_size_in_their_names(name: str) -> None:
    model = load_config(f"configs/{name}.yaml").model
    assert round(cost.model_parameters(model).total / 1e9, 1) == BILLIONS[name]
    text = Path(f"configs/{name}.yaml").read_text()
    assert f"{model.branches} gated branches deep: {BILLIONS[name]} B parameters" in text
