"""What is the same for every job at a site: `~/.config/dsv3/cluster.yaml`, or the YAML file that DSV3_CLUSTER names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dsv3_train.errors import UserError


class Cluster(BaseModel):
    """A site's defaults. Options of `dsv3 slurm submit` win over them."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    partition: Union[str, None] = None
    account: Union[str, None] = None
    time: Union[str, None] = None
    """Limit of one job, as SLURM writes it: "24:00:00" (quoted, or YAML takes it for a number), 7-00:00:00."""
    container: Union[str, None] = None
    """Image for pyxis (`srun --container-image`); null: no container."""
    mounts: list[str] = Field(default_factory=list)
    """For the container: SOURCE:TARGET. The working directory is mounted anyway."""
    modules: list[str] = Field(default_factory=list)
    """`module load` these."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the job; one that is set where the job is submitted wins."""
    setup: list[str] = Field(default_factory=list)
    """Lines of shell before anything starts: `source /shared/venv/bin/activate`."""
    sbatch: list[str] = Field(default_factory=list)
    """More options for sbatch: `--constraint=h800`."""
    srun: list[str] = Field(default_factory=list)
    """More options for srun: `--cpu-bind=none`."""
    gpus: bool = True
    """Ask for GPUs with `--gpus-per-node`; false where SLURM does not know of them."""

    @field_validator("*")
    @classmethod
    def _one_line_each(cls, value: Any, info: ValidationInfo) -> Any:
        """A second line of what is no shell would become shell."""
        for text in value if isinstance(value, (list, dict)) else [value]:
            if isinstance(text, str) and info.field_name != "setup" and re.search(r"[\x00-\x1f\x7f]", text):
                raise ValueError(f"{ascii(text)[:100]} has a control character in it; take it out")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{ascii(name)[:100]} is no name of a variable")
        return value


_LARGEST = 1 << 20
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_CLOCK = re.compile(r"(?:(\d+):)??(\d+)(?::(\d+))?")
"""[HOURS:]MINUTES[:SECONDS]; of two numbers the first are minutes."""


def seconds(time: str) -> float:
    """A limit as sbatch's `--time` reads it, in seconds; infinite for UNLIMITED.

    Raises:
        ValueError: sbatch would not take it; with the forms that it takes.
    """
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    if found := _DAYS.fullmatch(time):
        days, hours, minutes, rest = (int(number or 0) for number in found.groups())
    elif found := _CLOCK.fullmatch(time):
        days, (hours, minutes, rest) = 0, (int(number or 0) for number in found.groups())
    else:
        raise ValueError("give MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS or unlimited, as 24:00:00")
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def file() -> Path:
    """Where the site's file is, if there is one."""
    return Path(os.environ.get("DSV3_CLUSTER") or os.path.expanduser("~/.config/dsv3/cluster.yaml"))


def load() -> Cluster:
    """The site's file; without one, no defaults.

    Raises:
        UserError: the file is no YAML, or has a key that does not exist or a value of another type.
    """
    path = file()
    try:
        if not path.is_file():
            if os.environ.get("DSV3_CLUSTER"):
                raise UserError(f"DSV3_CLUSTER: {path} does not exist, or is no file")
            return Cluster()
        with path.open("rb") as stream:
            text = stream.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise UserError(f"{path}: more than {_LARGEST >> 10} KiB are no site's file")
        return Cluster.model_validate(yaml.safe_load(text.decode()) or {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise UserError(f"{path}: no YAML (brackets without end)") from None
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            known = ", ".join(Cluster.model_fields)
            unknown = fault["type"] == "extra_forbidden"
            lines.append(f"{path}: {key}: " + (f"unknown key; there are {known}" if unknown else fault["msg"]))
        raise UserError("\n".join(lines)) from None
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, a date that there is not
        raise UserError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
