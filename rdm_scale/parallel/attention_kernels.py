"""Choice of the attention kernel (`train.attention`) on GPUs: cuDNN's or flash attention.

Which one is faster depends on the card, the versions and the shape, so `auto` measures a forward and a backward of both
on the shapes of the run. A kernel that fails on any rank is not chosen. Other kernels of torch follow where the chosen
one does not fit, as for attention to captions, which has a mask.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.mesh import Mesh

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ROUNDS = 5  # measurements, of which the fastest counts


class AttentionShape(NamedTuple):
    """Shape of one call of self-attention: the tokens of a group attend to each other."""

    groups: int
    heads: int  # of all samples
    tokens: int
    head_size: int


Measure = Callable[[str, list[AttentionShape]], float]


def choose_attention_kernel(config: RunConfig, micro_batch: int, mesh: Mesh, report: Callable[[str], None]) -> None:
    """Set the kernel that attention prefers in this process. Collective where there are GPUs.

    Raises:
        ConfigError: a kernel is demanded that the device or the precision does not allow.
    """
    choice: str | None = config.train.attention
    if mesh.device.type != "cuda" or config.train.precision != "bf16":
        if choice != "auto":
            raise ConfigError(f"train.attention={choice} needs a GPU and train.precision=bf16; set it to auto")
        return
    if choice == "auto" and config.train.deterministic:
        choice = "flash"  # measured times would differ from start to start
    if choice == "auto":
        choice = fastest_kernel(attention_shapes(config, micro_batch), mesh, report, _milliseconds)
    if choice is None:
        prefer(_OTHERS)
    else:
        prefer([KERNELS[choice], *KERNELS.values(), *_OTHERS])


def attention_shapes(config: RunConfig, micro_batch: int) -> list[AttentionShape]:
    """Shapes of self-attention in two successive blocks, of which factorized attention has two kinds."""
    model = config.model
    frames, tokens = model.grid[0], math.prod(model.grid)
    heads = micro_batch * model.num_heads // config.parallel.tensor
    groups = {"full": 1, "spatial": frames, "temporal": tokens // frames}
    scopes = {model.attention_scope(number) for number in range(min(2, model.depth))}
    return [AttentionShape(groups[s], heads, tokens // groups[s], model.head_size) for s in sorted(scopes)]


def fastest_kernel(
    shapes: list[AttentionShape], mesh: Mesh, report: Callable[[str], None], measure: Measure
) -> str | None:
    """Name of the fastest kernel, by the slowest rank's time; None where all fail. Collective."""
    own = {name: _time_or_error(name, shapes, measure) for name in KERNELS}
    everyone = mesh.all_gather_object(own)
    times = {}
    for name in KERNELS:
        errors = [found[name] for found in everyone if isinstance(found[name], str)]
        if errors:
            report(f"attention: {name} is not used, because it failed when tried: {errors[0]}")
        else:
            times[name] = max(float(found[name]) for found in everyone)
    if not times:
        report("attention: kernels of torch that are slower are used")
        return None
    found = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
    best = min(times, key=times.__getitem__)
    report(f"attention: {best} (forward and backward of a block: {found})")
    return best


def prefer(order: list[SDPBackend]) -> None:
    """Prefer attention kernels in this order, from now on."""
    global _preference
    _preference = sdpa_kernel(list(dict.fromkeys(order)), set_priority=True)
    _preference.__enter__()


_preference: object = None  # entered for good: leaving it would restore torch's order


def _time_or_error(name: str, shapes: list[AttentionShape], measure: Measure) -> float | str:
    try:
        return measure(name, shapes)
    except RuntimeError as error:  # such as CUDNN_STATUS_INTERNAL_ERROR, or no support for the head size
        return str(error).splitlines()[0]


def _milliseconds(name: str, shapes: list[AttentionShape]) -> float:
    """Time of a forward and a backward for each shape, with q, k and v as views of one tensor, as in a block."""
    total = 0.0
    with sdpa_kernel(KERNELS[name]):
        for groups, heads, tokens, size in shapes:
            qkv = torch.randn(groups, tokens, heads, 3, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
            gradient = torch.randn(groups, tokens, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            times = []
            for _ in range(_ROUNDS + 1):  # the first one also prepares the kernel
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            total += min(times)
    torch.cuda.empty_cache()
    return total
