"""Every error that a user or the network can cause.

SmolError
├── ConfigError              a file, key or flag is wrong                           exit 2
├── DataError                a dataset is missing or unreadable                     exit 2
├── CheckpointError          a checkpoint is missing, damaged or foreign            exit 2
├── TransportError           bytes between two processes                            exit 3
│   ├── ConnectFailed        nobody answered at an address within the deadline
│   ├── ConnectionLost       the other side closed, or a frame broke off
│   ├── FrameError           bytes that are not a valid frame; ends the connection
│   └── AuthFailed           wrong token, version or run                            exit 2
├── ClusterError             who takes part                                         exit 3
│   ├── PeerLost             a rank died, was silent too long, or left early
│   └── RendezvousTimeout    not every rank came in time
├── CollectiveTimeout        a collective made no progress in time                  exit 3
├── CollectiveMismatch       ranks called different collectives                     exit 3
├── TooStale                 an update older than the staleness bound               exit 3
├── ServingError             a request could not be served                          exit 3
└── TrainingStopped          training ended by itself: NaN, disk full               exit 4

A message says what happened (with values), where (rank, peer, address, file and key) and what to do.
The command line prints it on one or two lines and exits with `exit_code`.
"""


class SmolError(Exception):
    """Base of all errors that a user or the network can cause."""

    exit_code = 3


class ConfigError(SmolError):
    """A file, key, flag or environment variable is wrong."""

    exit_code = 2


class DataError(SmolError):
    """A dataset or tokenizer is missing or unreadable."""

    exit_code = 2


class CheckpointError(SmolError):
    """A checkpoint is missing, damaged or belongs to something else."""

    exit_code = 2


class TransportError(SmolError):
    """Bytes between two processes did not get through."""


class ConnectFailed(TransportError):
    """Nobody answered at an address within the deadline."""


class ConnectionLost(TransportError):
    """The other side closed the connection, or a frame broke off."""


class FrameError(TransportError):
    """Bytes that are not a valid frame. The connection is closed: never resynchronise."""


class AuthFailed(TransportError):
    """The other side has another token, protocol version or run."""

    exit_code = 2


class ClusterError(SmolError):
    """The set of ranks is not what it should be."""


class PeerLost(ClusterError):
    """A rank died, was silent for longer than `cluster.patience`, or left early.

    Attributes:
        rank: which.
        may_return: it did not end but was silent, stopped or with its link down; or it lost us and not we it.
    """

    def __init__(self, message: str, rank: int, *, may_return: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.may_return = may_return


class RendezvousTimeout(ClusterError):
    """Not every rank came within the time that was allowed."""


class CollectiveTimeout(SmolError):
    """A collective or a receive made no progress within its timeout."""


class CollectiveMismatch(SmolError):
    """Two ranks called different collectives, or the same one with another dtype or count."""


class TooStale(SmolError):
    """An update is older than the staleness bound permits."""


class ServingError(SmolError):
    """A request could not be served."""


class TrainingStopped(SmolError):
    """Training ended by itself: a loss that is not finite, a full disk."""

    exit_code = 4


def error_of(name: str, text: str) -> SmolError | None:
    """An error that another rank had, from its class and text; None: none of these, or PeerLost, which needs a rank."""
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, SmolError)) or issubclass(kind, PeerLost):
        return None
    return kind(text)
