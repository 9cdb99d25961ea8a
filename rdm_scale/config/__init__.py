"""The validated configuration of a run.

This package imports neither PyTorch nor anything else that is slow to import, so that mistakes are reported within a
second. `load_config` opens nothing but the YAML file: it needs neither data nor a world size.
"""

from rdm_scale.config.checkpoints import CheckpointConfig, Weights, WeightsName, parse_weights
from rdm_scale.config.loading import describe_keys, load_config, parse_config, recorded_checkpoint_dir, to_yaml
from rdm_scale.config.model import AttentionScope, GateConfig, InputConfig, ModelConfig, TextConfig
from rdm_scale.config.schema import (
    DataConfig,
    DataSource,
    DiffusionConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    SamplingConfig,
    TrainConfig,
    flatten,
)
from rdm_scale.moved import moved_names

__all__ = [
    "AttentionScope",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "DiffusionConfig",
    "GateConfig",
    "InputConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "RunSection",
    "SamplingConfig",
    "TextConfig",
    "TrainConfig",
    "Weights",
    "WeightsName",
    "describe_keys",
    "flatten",
    "load_config",
    "parse_config",
    "parse_weights",
    "recorded_checkpoint_dir",
    "to_yaml",
]

__getattr__ = moved_names(__name__)
