"""A thousand blocks in bf16: what the fp32 residual stream is for."""

import torch
from torch import Tensor

from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.models import build_model

CONFIG = ModelConfig(
    input=InputConfig(height=8, width=8), patch_size=(1, 4, 4), hidden_size=32, num_heads=4, depth=1000, num_classes=4
)


def output(weights: dict[str, Tensor], dtype: torch.dtype, residual_dtype: torch.dtype) -> Tensor:
    model = build_model(CONFIG, residual_dtype=residual_dtype)
    model.load_state_dict(weights)
    model.to(dtype).set_positions()
    latents = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(latents, torch.tensor([700.0]), torch.tensor([3]))


def test_a_thousand_blocks_in_bf16_stay_within_two_percent() -> None:
    model = build_model(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.startswith("head."):  # they start at zero
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    weights = model.state_dict()
    exact = output(weights, torch.float32, torch.float32)
    errors = {
        name: float((output(weights, torch.bfloat16, dtype) - exact).norm() / exact.norm())
        for name, dtype in (("fp32 residuals", torch.float32), ("bf16 residuals", torch.bfloat16))
    }
    print("relative error of the output of 1,000 blocks in bf16 with", errors)
    assert errors["fp32 residuals"] < 0.02
    assert errors["bf16 residuals"] > 3 * errors["fp32 residuals"]
