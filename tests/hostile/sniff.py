"""Writes every packet on its namespace's loopback to a file, until its input ends: python sniff.py FILE."""

import select
import socket
import sys

ETH_P_ALL = 3

with (
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as raw,
    open(sys.argv[1], "wb", buffering=0) as file,
):
    raw.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: no packet may be dropped
    raw.bind(("lo", 0))
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([raw, sys.stdin], [], [])
        if raw in readable:
            file.write(raw.recv(1 << 17))
        elif sys.stdin in readable:
            break
