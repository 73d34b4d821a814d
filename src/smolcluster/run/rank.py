"""One rank of `--local N`, started by local.py as `python -m smolcluster.run.rank`. Speaks to its parent only."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolcluster.config.schema import Config
from smolcluster.errors import CollectiveTimeout, PeerLost, SmolError, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.log import log_to_stream
from smolcluster.run.parent import ParentLink
from smolcluster.run.supervisor import EXIT_FAILED, EXIT_INTERRUPTED
from smolcluster.transport.tcp import listen
