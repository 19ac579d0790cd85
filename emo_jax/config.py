"""What is a run? One dataclass that a config file fills, flags override and a run directory keeps."""

import dataclasses
import difflib
import json
from typing import Any

from emo_jax.data.config import DataConfig
from emo_jax.errors import UserError, require
from emo_jax.model.config import BalanceConfig, ModelConfig, PoolConfig
from emo_jax.parallel.config import MeshConfig
from emo_jax.training.config import OptimizerConfig, TrainConfig


@dataclasses.dataclass
class Config:
    """A run. Fields are never None: a switch is a `kind`, absence is 0 or an empty string."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Checks every field and their combinations.

        Raises:
          UserError: naming the field, its value and what would work.
        """
        self.model.validate()
        self.pool.validate(self.model)
        self.balance.validate()
        self.data.validate()
        self.train.validate()
        self.optimizer.validate(self.train.steps)
        self.mesh.validate()
        rows, parts = self.data.batch_size, self.train.microbatches
        require(
            rows % parts == 0,
            f"train.microbatches={parts} must divide data.batch_size={rows}.",
        )
        if self.balance.scope == "local":
            require(
                (rows // parts) % self.balance.local_rows == 0,
                f"balance.local_rows={self.balance.local_rows} must divide the {rows // parts} rows of a microbatch.",
            )

    def to_json(self) -> str:
        """The config as indented JSON, fields in the order of their definition."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The inverse of `to_json`.

        Raises:
          UserError: on a field this version does not know, with the nearest name.
        """
        return _from_dict(cls, json.loads(text), "")


def _from_dict(cls: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kwargs = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(unknown_field_message(prefix + name))
        if dataclasses.is_dataclass(fields[name].type):
            value = _from_dict(fields[name].type, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[name] = value
    return cls(**kwargs)


def field_names() -> list[str]:
    """Dotted names of every field of a run's config, such as `model.num_experts`."""
    names = []
    for section in dataclasses.fields(Config):
        names += [f"{section.name}.{field.name}" for field in dataclasses.fields(section.type)]
    return names


def unknown_field_message(name: str) -> str:
    """What to tell someone who set a field that does not exist; `name` is dotted, without `config.`."""
    names = field_names()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not near:  # right field, wrong section
        near = [full for full in names if full.split(".")[-1] == name.split(".")[-1]][:1]
    hint = f" Did you mean --config.{near[0]}?" if near else " See emo_jax/config.py for the fields."
    return f"There is no config field {name!r}.{hint}"
