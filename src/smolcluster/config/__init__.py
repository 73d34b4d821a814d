"""What the user writes: schema, loading with precedence, presets, and the machines of a cluster file."""

from smolcluster.config.dump import config_yaml
from smolcluster.config.hosts import Host, Member, members, roles
from smolcluster.config.load import Resolved, load_config
from smolcluster.config.schema import (
    Config,
    resolved_batch_size,
    resolved_epochs,
    resolved_staleness_bound,
    total_steps,
)

__all__ = [
    "Config",
    "Host",
    "Member",
    "Resolved",
    "config_yaml",
    "load_config",
    "members",
    "resolved_batch_size",
    "resolved_epochs",
    "resolved_staleness_bound",
    "roles",
    "total_steps",
]
