"""The training loop: batches, steps, observation and checkpoints."""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from rdm_scale import checkpoint
from rdm_scale.batch import LatentBatch, TrainingBatch
from rdm_scale.checkpoint.ownership import Ownership
from rdm_scale.checkpoint.start_weights import load_start_weights
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config import RunConfig
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.data.dataset import OpenSources, open_sources
from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.prefetch import Prefetcher
from rdm_scale.data.stream import LatentStream
from rdm_scale.device import TimeMark
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import ConfigError, NonFiniteError, StopRequested
from rdm_scale.evaluation.training_measure import TrainingMeasure
from rdm_scale.parallel.broadcast import broadcast_batches
from rdm_scale.parallel.failures import FailureReporter
from rdm_scale.parallel.hang_reports import HangWatch
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallelize import parallelize
from rdm_scale.parallel.plan import ParallelPlan
from rdm_scale.run_status import JobState
from rdm_scale.sampling.generate import SampleGrid
from rdm_scale.training.depth_probe import DepthProbe
from rdm_scale.training.monitor import Monitor, Record, RunMonitor, metrics_record
from rdm_scale.training.non_finite import refuse_non_finite_weights
from rdm_scale.training.optimizer import build_optimizer
from rdm_scale.training.probe_schedule import ProbeSchedule
from rdm_scale.training.rank_status import RankStatus
from rdm_scale.training.run_directory import Start, checkpoints_of
from rdm_scale.training.step import StepResult, StepUnderWay, training_step
from rdm_scale.training.step_profiler import StepProfiler
from rdm_scale.training.throughput import Throughput, best_case, find_peak


class Trainer:
    """Trains one model on one mesh, from `start` to `train.steps`."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        plan: ParallelPlan,
        facts: DataFacts,
        start: Start,
        reporter: FailureReporter,
        owner: Ownership | None = None,
    ) -> None:
        self.config, self.mesh, self.facts, self.reporter = config, mesh, facts, reporter
        self.step, self.origin = start.step, start.origin
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
            torch.use_deterministic_algorithms(True)
        self.profiler = StepProfiler(config, mesh)
        peak = find_peak(config, mesh.device) if mesh.is_first else None
        self.throughput = Throughput(config, mesh.world_size, peak)
        self.objective = build_objective(config.diffusion, config.model.learned_variance)
        self.model = parallelize(
            config,
            mesh,
            plan,
            partial(build_optimizer, config.optimizer, config.model, on_host=config.parallel.offload == "optimizer"),
        )
        if start.checkpoint is not None:
            checkpoint.load(start.checkpoint, self.model)
        elif start.weights is not None:
            load_start_weights(start.weights, self.model)
        self.empty_caption = None if facts.text is None else empty_caption(facts.text)
        self._buffers = BufferPool()  # shared, because training and validation never read at the same time
        # Rank 0 reads the manifests and lists the folders for all.
        sources = mesh.on_first(lambda: open_sources(config.data.train, config.data))
        self.stream = self._open_stream(start, sources) if mesh.reads_data else None
        self.held_out: HeldOut | None = None
        if config.data.validation:
            sources = mesh.on_first(lambda: open_sources(config.data.validation, config.data))
            self.held_out = self._open_held_out(sources) if mesh.reads_data else None
        self.grid = SampleGrid(config, mesh, facts) if config.monitor.sample_every else None
        self.measure = TrainingMeasure(config, mesh, facts) if config.monitor.measure_every else None
        self.monitor = RunMonitor(config, self.step) if mesh.is_first else Monitor()
        self.probe = DepthProbe(config, self.model)
        adapts = self.model.compiled is not None and mesh.device.type == "cuda" and not config.train.deterministic
        self.probe_schedule = ProbeSchedule(config.monitor.depth_every, adapts, mesh, self.step)
        self._under_way: deque[StepUnderWay] = deque()  # steps that are not read yet
        self._saver_asked_at = self.step  # newest step when the saver was last given something to do
        self.saver = checkpoint.Saver(
            checkpoints_of(config), config.checkpoint, self.model, mesh, self.monitor.report, owner
        )
        self.status = RankStatus(mesh, self.saver, self.stream.lost_shards if self.stream else None, reporter.stop)
        self.activity = reporter.activity
        self.activity.step = self.activity.completed = start.step
        self.activity.checkpoint = start.step or None
        for line in start.warnings:
            self.monitor.report(f"warning: {line}")
        if peak is not None and self.step < config.train.steps:
            self.monitor.report(best_case(config, plan, peak, config.train.steps - self.step))

    def run(self) -> JobState:
        """Train until the last step, or until asked to stop. In both cases the run is saved."""
        first, stopping = self.step, self.step >= self.config.train.steps
        if stopping:
            self.monitor.report(f"nothing to do: the run is at step {self.step}; raise train.steps to go on")
        if self.mesh.is_first:
            self.reporter.record(JobState.RUNNING)
        self.activity.phase = "training"
        prefetcher = Prefetcher(self._training_batches(), self.config.data.prefetch) if self.stream else nullcontext()
        with self._hang_watch() as watch, prefetcher as read:
            batches = broadcast_batches(self.mesh, read)
            while not stopping:
                watch.progress()
                with self.profiler.step(self.step + 1):
                    self._under_way.append(self.train_step(batches))
                    stopping, last = self._read_steps(), self.step == self.config.train.steps
                if stopping or last or self._due(self.config.checkpoint.every):  # before what may take long
                    self._save(wait=stopping or last)
                stopping = stopping or self._side_work_stopped() or last
            if self.step > first:
                self._save(wait=True)  # does nothing if this step is saved
        self.profiler.write()
        self.monitor.close()
        if self.step < self.config.train.steps:
            self.monitor.report(f"stopped on request after step {self.step}; the same command goes on from there")
            return JobState.STOPPED
        return JobState.FINISHED

    def _save(self, *, wait: bool) -> None:
        with self.activity.during("saving"):
            if wait:
                self.saver.save(self.state())
            else:
                self.saver.start(self.state())
        self._saver_asked_at = self.step
        self._note_checkpoint()

    def _note_checkpoint(self) -> None:
        """Say in messages and in status.json which checkpoint is the newest."""
        saved = self.saver.saved
        if saved is not None and saved != self.activity.checkpoint:
            self.activity.checkpoint = saved
            if self.mesh.is_first:
                self.reporter.record(JobState.RUNNING)

    def train_step(self, batches: Iterator[TrainingBatch]) -> StepUnderWay:
        """Give the next step to the device, without reading anything of it. Collective."""
        step = self.activity.step = self.step + 1
        began, began_s = TimeMark(self.mesh.device), time.perf_counter()
        with self.activity.during("reading data"):
            batch = next(batches)
        self.status.data_wait_s = time.perf_counter() - began_s
        watching = self._probing() if self.probe_schedule.is_due(step) else nullcontext()
        with self.activity.during("the training step"), watching:
            under_way = training_step(self.config, self.model, self.objective, batch, step, self.status, began)
        self.step = step
        return under_way

    def validation_loss(self) -> float:
        """Mean loss over the held-out set, with the noise and timestep that belong to each of its samples.

        Raises:
            StopRequested: on every rank, when one was asked to stop.
        """
        total = torch.zeros(2, dtype=torch.float64)  # weighted losses, and weights
        with self.model.evaluating():
            for batch in broadcast_batches(self.mesh, self._held_out_batches() if self.held_out else None):
                assert batch.weights is not None
                prediction = self.model(*self.objective.model_inputs(batch))
                loss_B = self.objective.sample_losses(prediction, batch)
                total += torch.stack([(loss_B.double() * batch.weights).sum(), batch.weights.sum()]).cpu()
                self._stop_if_asked()
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
            "started_from": self.origin,
            "layout": {
                "tensor": self.mesh.tensor_size,
                "pipeline": self.mesh.pipeline_size,
                "data": self.mesh.data_size,
            },
        }

    def _open_stream(self, start: Start, sources: OpenSources) -> LatentStream:
        return LatentStream(
            sources,
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

    def _open_held_out(self, sources: OpenSources) -> HeldOut:
        share = self.config.train.global_batch_size // self.mesh.data_size
        return HeldOut(
            sources,
            self.config.monitor.validation_samples,
            batch_size=self.config.train.micro_batch_size or share,
            dp_rank=self.mesh.data_rank,
            dp_size=self.mesh.data_size,
            config=self.config.data,
            captions=self.facts.text is not None,
            buffers=self._buffers,
        )

    def _hang_watch(self) -> HangWatch:
        return HangWatch(Path(self.config.run.dir), self.mesh.rank, self.mesh.timeout.total_seconds())

    def _training_batches(self) -> Iterator[TrainingBatch]:
        assert self.stream is not None
        seed, dropout = self.config.train.seed, self.config.diffusion.condition_dropout
        batches = (self._draw(latents, "train", seed, dropout) for latents in self.stream)
        return (batch.pinned() for batch in batches) if self.mesh.device.type == "cuda" else batches

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

    def _read_steps(self) -> bool:
        """Read and log steps, and do what is due after them; True if a rank was asked to stop. Collective.

        The newest step is left to the device, which has work while the host prepares the next one, unless something is
        due that follows it: a save, the end of the run, validation, samples, measures of samples or a depth profile.
        All ranks read a step at the same time, so that they agree on what follows from it.
        """
        stopping, leave = False, 0 if self._newest_is_needed() else 1
        while len(self._under_way) > leave:
            try:
                result = self._under_way.popleft().read(self.mesh, self.config)
            except NonFiniteError:
                self.saver.finish()  # the checkpoint under way is of a good step, or this says that it is not
                refuse_non_finite_weights(self.model)
                raise
            self.activity.completed = result.step
            self._observe(result)
            if result.statistics.stop_requests > 0:
                stopping, leave = True, 0
        return stopping

    def _newest_is_needed(self) -> bool:
        config = self.config
        intervals = [config.checkpoint.every, config.monitor.sample_every, config.monitor.measure_every]
        intervals += [config.monitor.validate_every] if config.data.validation else []
        return (
            self.step == config.train.steps or self.probe_schedule.is_due(self.step) or any(map(self._due, intervals))
        )

    def _observe(self, result: StepResult) -> None:
        """Act on what the ranks said in a step, then log it, with its depth profile where that is due."""
        if result.statistics.lost_shards:
            self._share_lost_shards()
        # Before that step the saver may have been given what it still works on, unknown to this step's statistics.
        if not result.statistics.saving and result.step > self._saver_asked_at:
            self.saver.advance()
            self._saver_asked_at = self.step
            self._note_checkpoint()
        if self.probe_schedule.is_due(result.step):
            self.monitor.depth(result.step, self.probe.profile(result.grad_norm))
        self.monitor.step(self._metrics(result))

    def _metrics(self, result: StepResult) -> Record:
        record = metrics_record(self.config, result, self.throughput)
        stall_s = self.saver.take_stall()
        if stall_s is not None:  # a save began after the previous step
            record |= {"save_stall_s": stall_s, "failed_saves": self.saver.failures}
        if self.stream and self.config.data.lost_shards:
            record |= {"lost_shards": len(self.stream.lost_shards), "lost_samples": self.stream.lost_shards.samples}
        return record

    def _side_work_stopped(self) -> bool:
        """Validate, measure and draw samples, each at its own interval; True if a request to stop ended that."""
        try:
            if self.config.data.validation and self._due(self.config.monitor.validate_every):
                with self.activity.during("validation"):
                    self.monitor.add(self.step, {"validation_loss": self.validation_loss()})
            if self.measure is not None and self._due(self.config.monitor.measure_every):
                with self.activity.during("the measures of samples"):
                    self._measure_samples(self.measure)
            if self.grid is not None and self._due(self.config.monitor.sample_every):
                with self.activity.during("the drawing of samples"):
                    self._draw_samples(self.grid)
        except StopRequested:
            return True
        return False

    def _measure_samples(self, measure: TrainingMeasure) -> None:
        with self.model.evaluating(ema=True):
            measures = measure.measure(self.model, self.step, lambda done, steps: self._stop_if_asked())
        self.monitor.add(self.step, {each.name: each.value for each in measures})
        self.monitor.measures(self.step, measures)

    def _draw_samples(self, grid: SampleGrid) -> None:
        image = None
        try:
            with self.model.evaluating(ema=True):
                image = grid.draw(self.model, lambda done, steps: self._stop_if_asked())
        except (ConfigError, NonFiniteError) as error:  # a grid is no reason to end a run
            self.monitor.report(f"warning: no sample grid of step {self.step}: {error}")
        if image is not None:
            self.monitor.image_grid(self.step, image)

    def _stop_if_asked(self) -> None:
        self.mesh.stop_if_any(self.reporter.stop.requested)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @contextmanager
    def _probing(self) -> Iterator[None]:
        with self.probe_schedule.measured(), self.probe.watching():
            yield
