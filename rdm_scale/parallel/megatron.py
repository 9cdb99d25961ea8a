"""All that touches megatron-core (tested with 0.16.1)."""

import warnings
from typing import Any

# It looks for both at import, in four modules, for optimizers that are not used here.
warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)

from megatron.core import parallel_state  # noqa: E402

# What DeepSpeed asks of a model-parallel unit, all of which parallel_state must still offer.
_ASKED_BY_DEEPSPEED = (
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
)
_missing = [name for name in _ASKED_BY_DEEPSPEED if not hasattr(parallel_state, name)]
if _missing:
    raise ImportError(
        f"megatron-core lacks parallel_state.{_missing[0]}; rdm_scale is tested with megatron-core 0.16.1"
    )


class ModelParallelUnit:
    """parallel_state under the names of DeepSpeed's `mpu` protocol."""

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


def initialise_axes(tensor: int, pipeline: int) -> dict[str, Any]:
    """Makes the process groups of a mesh: tensor-parallel ranks next to each other, then data, then pipeline."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, order="tp-cp-ep-dp-pp"
        )
    return {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "tensor_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "pipeline_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_rank": parallel_state.get_data_parallel_rank(),
        "data_size": parallel_state.get_data_parallel_world_size(),
        "data_group": parallel_state.get_data_parallel_group(),
    }
