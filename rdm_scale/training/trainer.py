"""The training loop."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_scale import checkpoint
from rdm_scale.batch import TrainingBatch
from rdm_scale.conditions import Condition
from rdm_scale.config import RunConfig
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.prefetch import Prefetcher
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import NonFiniteError
from rdm_scale.parallel.broadcast import shared
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallelize import parallelize
from rdm_scale.parallel.plan import Layout
from rdm_scale.sampling.generate import SampleGrid
from rdm_scale.training.depth_probe import DepthProbe
from rdm_scale.training.ema import Ema
from rdm_scale.training.monitor import Monitor, RunMonitor
from rdm_scale.training.optimizer import build_optimizer, learning_rate
from rdm_scale.training.run_directory import Start, checkpoints_of


class Trainer:
    """Trains one model on one mesh, from `start` to `train.steps`."""

    def __init__(self, config: RunConfig, mesh: Mesh, layout: Layout, facts: DataFacts, start: Start) -> None:
        self.config, self.mesh, self.facts = config, mesh, facts
        self.step = start.step
        self.stop_requested = False
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
            torch.use_deterministic_algorithms(True)
        self.objective = build_objective(config.diffusion, config.model.learned_variance)
        self.model = parallelize(config, mesh, layout, partial(build_optimizer, config.optimizer, config.model))
        self.zero = self.model.zero
        self.ema = Ema(self.zero.masters, config.optimizer.ema_decay)
        if start.checkpoint is not None:
            checkpoint.load(start.checkpoint, self.zero, self.ema.flats)
        self.stream = self._open_stream(start) if mesh.reads_data else None
        self.draw = partial(
            draw,
            objective=self.objective,
            seed=config.train.seed,
            num_classes=config.model.num_classes if config.model.condition == "class" else None,
            empty_caption=None if facts.text is None else empty_caption(facts.text),
        )
        self.held_out = self._open_held_out() if config.data.validation and mesh.reads_data else None
        self.grid = SampleGrid(config, mesh, facts) if config.monitor.sample_every else None
        self.monitor = RunMonitor(config, self.step) if mesh.is_first else Monitor()
        self.probe = DepthProbe(config, self.zero, mesh)
        self.saver = checkpoint.Saver(
            checkpoints_of(config), config.checkpoint, self.zero, self.ema.flats, mesh, self.monitor.say
        )
        for line in start.skipped:
            self.monitor.say(f"warning: {line}")

    def run(self) -> None:
        """Trains until the last step, or until asked to stop: then the step under way is finished and saved."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._request_stop)
        stopping = self.step >= self.config.train.steps
        if stopping:
            self.monitor.say(f"nothing to do: the run is at step {self.step}; raise train.steps to go on")
        with Prefetcher(self._drawn(), self.config.data.prefetch) if self.stream else nullcontext() as read:
            batches = shared(self.mesh, read)
            while not stopping:
                record, asked_to_stop = self.train_step(batches)
                stopping = asked_to_stop or self.step == self.config.train.steps
                self._observe(record)
                if stopping:
                    self.saver.save(self.state())
                elif self._due(self.config.checkpoint.every):
                    self.saver.start(self.state())
        if self.step < self.config.train.steps:
            self.monitor.say(f"stopped on request after step {self.step}; the same command goes on from there")
        self.monitor.close()

    def train_step(self, batches: Iterator[TrainingBatch]) -> tuple[dict[str, Any], bool]:
        """One optimizer step on the next global batch: its metrics, and whether some rank was asked to stop."""
        began = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - began
        probing = self._probe_is_due()
        with self.probe.watching() if probing else nullcontext():
            record, stop = self._update(batch, waited_s, began)
        if probing:
            self.monitor.depth(self.step, self.probe.profile(record["grad_norm"]))
        return record, stop

    def _update(self, batch: TrainingBatch, waited_s: float, began: float) -> tuple[dict[str, Any], bool]:
        micro_batches = batch.split(self.config.train.micro_batch_size or len(batch))
        loss_B = self.model.accumulate(micro_batches, self.model_inputs, self.loss_of).double()
        news = self.stream.lost_shards.take_warnings() if self.stream else []
        total, stop, waited_s, lost, saving = self.mesh.all_reduce_sum(
            [
                loss_B.sum().item(),
                float(self.stop_requested),
                waited_s / self.mesh.world_size,
                float(len(news)),
                float(self.saver.busy),
            ]
        )
        if lost:
            self._share_losses(news)
        if not saving:
            self.saver.advance()
        loss = total / (self.mesh.world_size // self.mesh.data_size) / self.config.train.global_batch_size
        self._refuse_non_finite("loss", loss, batch, loss_B)
        lr = learning_rate(self.config.optimizer, self.step + 1)
        grad_norm = self.model.step(lr)
        self._refuse_non_finite("gradient norm", grad_norm, batch, loss_B)
        self.step += 1
        self.ema.update(self.zero.masters, self.step)
        step_s = time.perf_counter() - began
        samples = self.config.train.global_batch_size
        record = {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "samples": self.step * samples,
            "step_s": step_s,
            "tokens_per_s": samples * self.config.model.tokens_of(batch.latents.shape[2:]) / step_s,
            "data_wait_s": waited_s,
            "data_wait_share": waited_s / step_s,
        }
        if self.saver.stall_s is not None:  # of the save after the step before
            record |= {"save_stall_s": self.saver.stall_s, "failed_saves": self.saver.failures}
            self.saver.stall_s = None
        if self.stream and self.config.data.lost_shards:
            record |= {"lost_shards": len(self.stream.lost_shards), "lost_samples": self.stream.lost_shards.samples}
        return record, stop > 0

    def model_inputs(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Condition]:
        """What the model takes: noised latents, timesteps and condition."""
        x_t = self.objective.noised(batch.latents, batch.noise, batch.t)
        return x_t, self.objective.model_timesteps(batch.t), batch.model_condition

    def loss_of(self, prediction: Tensor, batch: TrainingBatch) -> Tensor:
        """Loss of each sample [B]."""
        x_t = self.objective.noised(batch.latents, batch.noise, batch.t)
        return self.objective.loss(prediction, batch.latents, batch.noise, batch.t, x_t)

    def validation_loss(self) -> float:
        """Mean loss over the held-out set, with the noise and timestep that belong to each of its samples."""
        total = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the samples
        with self.zero.evaluating():
            for batch in shared(self.mesh, self._held_out_batches() if self.held_out else None):
                assert batch.weights is not None
                loss_B = self.loss_of(self.model(*self.model_inputs(batch)), batch)
                total += torch.stack([(loss_B.double() * batch.weights).sum(), batch.weights.sum()]).cpu()
        loss, samples = self.mesh.all_reduce_sum_over_data(total).tolist()
        return loss / samples

    def state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch_size,
            "config": self.config.model_dump(mode="json"),
            "identity": self.config.identity() | {"data": self.facts.identity},
            "codec": self.facts.codec.model_dump(mode="json"),
            "class_names": list(self.facts.class_names),
            "text": None if self.facts.text is None else self.facts.text.model_dump(mode="json"),
            "lost_shards": self.stream.lost_shards.known if self.stream else [],
            "layout": {
                "tensor": self.mesh.tensor_size,
                "pipeline": self.mesh.pipeline_size,
                "data": self.mesh.data_size,
            },
        }

    def _open_stream(self, start: Start) -> LatentStream:
        return LatentStream(
            self.config.data.train,
            global_batch_size=self.config.train.global_batch_size,
            seed=self.config.train.seed,
            dp_rank=self.mesh.data_rank,
            dp_size=self.mesh.data_size,
            start_step=self.step,
            config=self.config.data,
            lost=start.lost_shards,
            captions=self.facts.text is not None,
        )

    def _open_held_out(self) -> HeldOut:
        share = self.config.train.global_batch_size // self.mesh.data_size
        return HeldOut(
            self.config.data.validation,
            self.config.monitor.validation_samples,
            batch_size=self.config.train.micro_batch_size or share,
            dp_rank=self.mesh.data_rank,
            dp_size=self.mesh.data_size,
            config=self.config.data,
            captions=self.facts.text is not None,
        )

    def _drawn(self) -> Iterator[TrainingBatch]:
        assert self.stream is not None
        return (self.draw(b, condition_dropout=self.config.diffusion.condition_dropout) for b in self.stream)

    def _held_out_batches(self) -> Iterator[TrainingBatch]:
        assert self.held_out is not None
        for latents, weights in self.held_out:
            # Of seed 0 whatever the run's, so that the losses of different runs can be compared.
            batch = self.draw(latents, condition_dropout=0.0, purpose="validation", seed=0)
            yield dataclasses.replace(batch, weights=weights)

    def _share_losses(self, news: list[str]) -> None:
        """Lets every rank know which shards are lost, and tells the user."""
        everyone = self.mesh.all_gather_object((news, self.stream.lost_shards.known if self.stream else []))
        for line in (line for told, _ in everyone for line in told):
            self.monitor.say(f"warning: {line}")
        if self.stream:
            self.stream.lost_shards.merge([shard for _, known in everyone for shard in known])

    def _observe(self, record: dict[str, Any]) -> None:
        """What is looked at after a step: validation loss and samples, each in its own rhythm."""
        if self.config.data.validation and self._due(self.config.monitor.validate_every):
            record["validation_loss"] = self.validation_loss()
        self.monitor.step(record)
        if self.grid is not None and self._due(self.config.monitor.sample_every):
            with self.zero.holding(self.ema.flats):
                image = self.grid.draw(self.model)
            if image is not None:
                self.monitor.pictures(self.step, image)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _probe_is_due(self) -> bool:
        """For the step that begins: in the rhythm of the configuration, and in the first of all."""
        every = self.config.monitor.depth_every
        return every > 0 and ((self.step + 1) % every == 0 or self.step == 0)

    def _request_stop(self, signal_number: int, frame: object) -> None:
        self.stop_requested = True

    def _refuse_non_finite(self, what: str, value: float, batch: TrainingBatch, loss_B: Tensor) -> None:
        """Ends the run before anything is updated or saved, naming the samples."""
        if math.isfinite(value):
            return
        self.saver.finish()
        bad = (~loss_B.isfinite()).cpu()
        suspects = bad if what == "loss" else torch.ones_like(bad)  # a gradient does not say where it went wrong
        samples = [number for ids in self.mesh.all_gather_object(batch.ids[suspects].tolist()) for number in ids]
        where = Path(self.config.run.dir) / f"non_finite_step_{self.step + 1:08d}.json"
        if self.mesh.is_first:
            where.write_text(json.dumps({"step": self.step + 1, "what": what, "sample_ids": samples}))
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        raise NonFiniteError(
            f"the {what} of step {self.step + 1} is {value}, on the samples with ids {shown} (all in {where}); nothing "
            f"was saved after step {self.step}. Look at those samples, or lower optimizer.lr or optimizer.grad_clip"
        )
