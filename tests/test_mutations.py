"""The tests of parallelism can fail: each deliberate breakage is caught by the test named beside it."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LAYOUTS = "tests/distributed/test_layouts.py::test_layout"
FAMILY = "tests/distributed/test_family.py::test_every_layout_trains_the_same_model"


class Mutation(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "replicated parameters count on every tensor-parallel rank in the norm",
        "parallel/zero/engine.py",
        "slices[name].count > 1 or self.mesh.tensor_rank == 0",
        "True",
        f"{LAYOUTS}[tp4 pp1 dp2, ZeRO 2, 1f1b, recompute full]",
    ),
    Mutation(
        "replicated parameters in flat buffers count on every tensor-parallel rank in the norm",
        "parallel/zero/stage3_gathered.py",
        "if self.mesh.tensor_rank == 0 or not layout.kind.replicated",
        "if True",
        f"{LAYOUTS}[tp2 pp1 dp3, ZeRO 3 kept, sequence, 1f1b, recompute every_2]",
    ),
    Mutation(
        "the norm leaves out the other pipeline stages",
        "parallel/megatron_adapter.py",
        "get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)",
        "get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)",
        f"{LAYOUTS}[tp1 pp2 dp4, ZeRO 3 kept, interleaved_1f1b, recompute none]",
    ),
    Mutation(
        "DeepSpeed is not told that another backward begins",
        "parallel/zero/deepspeed_adapter.py",
        "self._zero.clear_backward_seen_flag()",
        "pass",
        f"{LAYOUTS}[tp1 pp2 dp4, ZeRO 3 by block, interleaved_1f1b, recompute every_2]",
    ),
    Mutation(
        "a second chunk's gradients are added to the last step's",
        "parallel/zero/deepspeed_adapter.py",
        "self.gradients.zero_()",
        "pass",
        f"{LAYOUTS}[tp1 pp2 dp4, ZeRO 3 by block, interleaved_1f1b, recompute every_2]",
    ),
    Mutation(
        "a step adds to the last step's gradients",
        "parallel/zero/stage3_gathered.py",
        "self._moved: set[int] = set()",
        "self._moved: set[int] = getattr(self, '_moved', set())",
        f"{LAYOUTS}[tp2 pp4 dp1, ZeRO 3 kept, v_1f1b, recompute full]",
    ),
    Mutation(
        "gradients of gates are not summed over the ranks that share the tokens",
        "parallel/tensor.py",
        "operators.all_reduce_sum(flat, ctx.group)",
        "flat",
        f"{LAYOUTS}[tp2 pp1 dp4, ZeRO 2, sequence, 1f1b, recompute selective]",
    ),
    Mutation(
        "the loss is not divided by the number of micro-batches",
        "parallel/parallel_model.py",
        "loss_B.mean() / self.number",
        "loss_B.mean()",
        f"{LAYOUTS}[tp1 pp1 dp8, ZeRO 0, 1f1b, recompute none]",
    ),
    Mutation(
        "gradients are summed and not averaged over the data-parallel ranks",
        "parallel/zero/stage3_gathered.py",
        "square.sqrt() / self.mesh.data_size",
        "square.sqrt()",
        f"{LAYOUTS}[tp1 pp1 dp8, ZeRO 3 kept, 1f1b, recompute selective]",
    ),
    Mutation(
        "a bucket is reduced after the first micro-batch",
        "parallel/zero/stage3_gathered.py",
        "self._last_backward = last",
        "self._last_backward = True",
        f"{LAYOUTS}[tp1 pp1 dp8, ZeRO 3 kept, 1f1b, recompute selective]",
    ),
    Mutation(
        "gradients are not summed over the copies of a shard",
        "parallel/zero/stage3_gathered.py",
        "dist.all_reduce(total, group=self.mesh.copies.group)",
        "pass",
        f"{LAYOUTS}[tp1 pp1 dp4, ZeRO 3 kept in groups of 2, 1f1b, recompute none]",
    ),
    Mutation(
        "stage 0 does not reduce gradients",
        "parallel/zero/stages012.py",
        "dist.all_reduce(flat, group=self.mesh.copies.group)",
        "pass",
        f"{LAYOUTS}[tp1 pp1 dp3, ZeRO 0, 1f1b, recompute none]",
    ),
    Mutation(
        "the products of tensor-parallel ranks are not summed",
        "parallel/tensor_operators.py",
        "dist.all_reduce(product_SBO, group=_group(group))",
        "pass",
        f"{LAYOUTS}[tp4 pp2 dp1, ZeRO 0, interleaved_1f1b, recompute selective]",
    ),
    Mutation(
        "a message is taken for the one that was waited for",
        "parallel/pipeline/executor.py",
        "arriving = next(self.expected[source])",
        "arriving = action",
        "tests/distributed/test_pipeline.py",
    ),
    Mutation(
        "the condition's gradient ends at a stage's boundary",
        "parallel/stage.py",
        "conditioning.embedding.view_as(conditioning.embedding)",
        "conditioning.embedding.detach() + 0 * z_SBD[0]",
        f"{LAYOUTS}[tp1 pp8 dp1, ZeRO 1, 1f1b, recompute every_2]",
    ),
    Mutation(
        "every tensor-parallel rank starts with the first part of a weight",
        "models/layers.py",
        "return logical.chunk(self.count, self.dim)[self.index]",
        "return logical.chunk(self.count, self.dim)[0]",
        f"{LAYOUTS}[tp4 pp1 dp2, ZeRO 2, 1f1b, recompute full]",
    ),
    Mutation(
        "every tensor-parallel rank saves its slice of a tensor as the first one",
        "checkpoint/sharded_state.py",
        "slices.offset + shift[:, slices.tensor]",
        "slices.offset",
        "tests/checkpoint/test_sharded_state.py::test_slices_hold_the_elements_of_the_rank_s_buffer",
    ),
    Mutation(
        "every parameter has the scheduled learning rate, whatever the width",
        "parallel/zero/engine.py",
        'group["lr"] = lr * group["lr_scale"]',
        'group["lr"] = lr',
        f"{FAMILY}[base of another size]",
    ),
    Mutation(
        "gradients of the scales of queries and keys are not summed over the heads of all ranks",
        "parallel/tensor.py",
        "return list(_GradientAllReduce.apply(self.ranks.group, *tensors))\n",
        "return tensors\n",
        f"{FAMILY}[rotary]",
    ),
    Mutation(
        "a long skip's gradient ends at a stage's boundary",
        "parallel/stage.py",
        "tuple(skip for _, skip in sorted(skips.items()))",
        "tuple(skip.detach() + 0 * skip for _, skip in sorted(skips.items()))",
        f"{FAMILY}[u]",
    ),
]


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_mutation_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    for folder in ("rdm_scale", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "rdm_scale" / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, "the line to break is not there, or not once"
    path.write_text(source.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 1, f"not caught, or not run:\n{done.stdout[-3000:]}"
