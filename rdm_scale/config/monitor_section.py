"""Section `monitor` of the configuration."""

from pydantic import Field

from rdm_scale.config.section import Section


class MonitorConfig(Section):
    """Intervals of metrics, validation, profiles and sample grids (keys `monitor.*`)."""

    log_every: int = Field(10, ge=1, description="steps between lines of console output")
    tensorboard: bool = Field(True, description="write metrics and sample grids to run.dir/tensorboard")
    validate_every: int = Field(500, ge=0, description="steps between validation losses; 0: never")
    validation_samples: int = Field(1024, ge=1, description="maximum number of validation samples")
    depth_every: int = Field(
        100, ge=0, description="steps between profiles over depth in run.dir/depth.jsonl; 0: never"
    )
    sample_every: int = Field(0, ge=0, description="steps between sample grids in run.dir/samples; 0: never")
    sample_columns: int = Field(
        10, ge=1, description="columns of a sample grid: classes, or samples of a model without classes"
    )
    measure_every: int = Field(
        0,
        ge=0,
        description="steps between measures of samples (Frechet distance, KID) against monitor.reference; 0: never",
    )
    measure_samples: int = Field(1000, ge=2, description="number of samples that are drawn for a measure")
    reference: str | None = Field(
        None, description="path or URL of the real set's statistics, as tools/measure.py reference writes them"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="peak of a GPU in TFLOP/s, of which MFU is a share; null: that of a matrix product measured at the "
        "start (no MFU on CPUs)",
    )
