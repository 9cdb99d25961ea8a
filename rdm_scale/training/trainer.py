"""The training loop: batches, steps, observation and checkpoints."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch

from rdm_scale import checkpoint
from rdm_scale.batch import LatentBatch, TrainingBatch
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config import RunConfig
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.prefetch import Prefetcher
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import NonFiniteError
from rdm_scale.parallel.broadcast import broadcast_batches
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallelize import parallelize
from rdm_scale.parallel.plan import ParallelPlan
from rdm_scale.sampling.generate import SampleGrid
from rdm_scale.training.depth_probe import DepthProbe
from rdm_scale.training.monitor import Monitor, Record, RunMonitor, metrics_record
from rdm_scale.training.optimizer import build_optimizer
from rdm_scale.training.rank_status import RankStatus
from rdm_scale.training.run_directory import Start, checkpoints_of
from rdm_scale.training.step import StepResult, training_step


class Trainer:
    """Trains one model on one mesh, from `start` to `train.steps`."""

    def __init__(self, config: RunConfig, mesh: Mesh, plan: ParallelPlan, facts: DataFacts, start: Start) -> None:
        self.config, self.mesh, self.facts = config, mesh, facts
        self.step = start.step
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
            torch.use_deterministic_algorithms(True)
        self.objective = build_objective(config.diffusion, config.model.learned_variance)
        self.model = parallelize(config, mesh, plan, partial(build_optimizer, config.optimizer, config.model))
        if start.checkpoint is not None:
            checkpoint.load(start.checkpoint, self.model)
        self.empty_caption = None if facts.text is None else empty_caption(facts.text)
        self._buffers = BufferPool()  # shared, because training and validation never read at the same time
        self.stream = self._open_stream(start) if mesh.reads_data else None
        self.held_out = self._open_held_out() if config.data.validation and mesh.reads_data else None
        self.grid = SampleGrid(config, mesh, facts) if config.monitor.sample_every else None
        self.monitor = RunMonitor(config, self.step) if mesh.is_first else Monitor()
        self.probe = DepthProbe(config, self.model)
        self.saver = checkpoint.Saver(checkpoints_of(config), config.checkpoint, self.model, mesh, self.monitor.report)
        self.status = RankStatus(mesh, self.saver, self.stream.lost_shards if self.stream else None)
        for line in start.skipped:
            self.monitor.report(f"warning: {line}")

    def run(self) -> None:
        """Train until the last step, or until asked to stop: then the step under way is finished and saved."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._request_stop)
        stopping = self.step >= self.config.train.steps
        if stopping:
            self.monitor.report(f"nothing to do: the run is at step {self.step}; raise train.steps to go on")
        with Prefetcher(self._training_batches(), self.config.data.prefetch) if self.stream else nullcontext() as read:
            batches = broadcast_batches(self.mesh, read)
            while not stopping:
                began = time.perf_counter()
                result = self.train_step(batches)
                stopping = result.statistics.stop_requests > 0 or self.step == self.config.train.steps
                self._observe(self._metrics(result, time.perf_counter() - began))
                if stopping:
                    self.saver.save(self.state())
                elif self._due(self.config.checkpoint.every):
                    self.saver.start(self.state())
        if self.step < self.config.train.steps:
            self.monitor.report(f"stopped on request after step {self.step}; the same command goes on from there")
        self.monitor.close()

    def train_step(self, batches: Iterator[TrainingBatch]) -> StepResult:
        """Train on the next global batch, then act on its statistics. Collective."""
        began = time.perf_counter()
        batch = next(batches)
        self.status.data_wait_s = time.perf_counter() - began
        step = self.step + 1
        probing = self._probe_is_due(step)
        try:
            with self.probe.watching() if probing else nullcontext():
                result = training_step(self.config, self.model, self.objective, batch, step, self.status)
        except NonFiniteError:
            self.saver.finish()  # the checkpoint under way is of a good step
            raise
        self.step = step
        if result.statistics.lost_shards:
            self._share_lost_shards()
        if not result.statistics.saving:
            self.saver.advance()
        if probing:
            self.monitor.depth(step, self.probe.profile(result.grad_norm))
        return result

    def validation_loss(self) -> float:
        """Mean loss over the held-out set, with the noise and timestep that belong to each of its samples."""
        total = torch.zeros(2, dtype=torch.float64)  # weighted losses, and weights
        with self.model.evaluating():
            for batch in broadcast_batches(self.mesh, self._held_out_batches() if self.held_out else None):
                assert batch.weights is not None
                prediction = self.model(*self.objective.model_inputs(batch))
                loss_B = self.objective.sample_losses(prediction, batch)
                total += torch.stack([(loss_B.double() * batch.weights).sum(), batch.weights.sum()]).cpu()
        loss, samples = self.mesh.all_reduce_sum_over_data(total).tolist()
        return loss / samples

    def state(self) -> CheckpointState:
        """State that a checkpoint holds beside its tensors."""
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
            buffers=self._buffers,
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
            buffers=self._buffers,
        )

    def _training_batches(self) -> Iterator[TrainingBatch]:
        assert self.stream is not None
        seed, dropout = self.config.train.seed, self.config.diffusion.condition_dropout
        return (self._draw(latents, "train", seed, dropout) for latents in self.stream)

    def _held_out_batches(self) -> Iterator[TrainingBatch]:
        assert self.held_out is not None
        for latents, weights in self.held_out:
            # Seed 0 for every run, so that the losses of different runs can be compared.
            batch = self._draw(latents, "validation", 0, condition_dropout=0.0)
            yield dataclasses.replace(batch, weights=weights)

    def _draw(self, latents: LatentBatch, purpose: str, seed: int, condition_dropout: float) -> TrainingBatch:
        model = self.config.model
        return draw(
            latents,
            objective=self.objective,
            seed=seed,
            num_classes=model.num_classes if model.condition == "class" else None,
            condition_dropout=condition_dropout,
            empty_caption=self.empty_caption,
            purpose=purpose,
        )

    def _share_lost_shards(self) -> None:
        """Exchange the lost shards that ranks know of, and report them. Collective."""
        known = self.stream.lost_shards.known if self.stream else []
        everyone = self.mesh.all_gather_object((self.status.take_warnings(), known))
        for line in (line for warnings, _ in everyone for line in warnings):
            self.monitor.report(f"warning: {line}")
        if self.stream:
            self.stream.lost_shards.merge([shard for _, shards in everyone for shard in shards])

    def _metrics(self, result: StepResult, step_s: float) -> Record:
        record = metrics_record(self.config, result, step_s)
        stall_s = self.saver.take_stall()
        if stall_s is not None:  # a save began after the previous step
            record |= {"save_stall_s": stall_s, "failed_saves": self.saver.failures}
        if self.stream and self.config.data.lost_shards:
            record |= {"lost_shards": len(self.stream.lost_shards), "lost_samples": self.stream.lost_shards.samples}
        return record

    def _observe(self, record: Record) -> None:
        """Log a step's metrics; validate and draw samples, each at its own interval."""
        if self.config.data.validation and self._due(self.config.monitor.validate_every):
            record["validation_loss"] = self.validation_loss()
        self.monitor.step(record)
        if self.grid is not None and self._due(self.config.monitor.sample_every):
            with self.model.evaluating(ema=True):
                image = self.grid.draw(self.model)
            if image is not None:
                self.monitor.image_grid(self.step, image)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _probe_is_due(self, step: int) -> bool:
        """True at the configured interval, and at the first step of all."""
        every = self.config.monitor.depth_every
        return every > 0 and (step % every == 0 or step == 1)

    def _request_stop(self, signal_number: int, frame: object) -> None:
        self.status.stop_requested = True
