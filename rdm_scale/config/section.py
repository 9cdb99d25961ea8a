"""Base class of all sections of the configuration."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _word(value: Any) -> Any:
    """The word for true and false, which YAML reads as booleans."""
    return str(value).lower() if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "true", "false"], BeforeValidator(_word)]


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
