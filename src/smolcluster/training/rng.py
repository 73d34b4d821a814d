"""torch's random generators of one rank: what a checkpoint keeps of them, so that dropout goes on where it was."""

from __future__ import annotations

import hashlib

import torch

from smolcluster.checkpoint.state import Shard, StateReader


def rng_state(rank: int, device: torch.device) -> dict[str, Shard]:
    """The generators' states under `rng/<rank>/<device type>`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return {f"rng/{rank:04d}/{name}": Shard(state, "rng") for name, state in states.items()}


def load_rng_state(reader: StateReader, rank: int, world_size: int, device: torch.device, seed: int) -> None:
    """Set this rank's generators; every rank calls it, since reading may communicate.

    With as many ranks as the checkpoint has, and on the same type of device, random numbers go on as if there had been
    no interruption. Else they start anew, from the seed, the step and the rank.
    """
    stored = reader.names("rng/")
    ranks = {name.split("/")[1] for name in stored}
    states = {name: reader.read(name) for name in stored}
    own = {name.split("/")[2]: state for name, state in states.items() if name.split("/")[1] == f"{rank:04d}"}
    if len(ranks) != world_size or not {"cpu", device.type} <= own.keys():
        digest = hashlib.sha256(f"{seed}:{reader.step}:{rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return
    torch.set_rng_state(own["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(own["mps"])
