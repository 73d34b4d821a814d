"""A rank made of the standard library only: does what its bootstrap's "script" says. Run by the supervisor's tests."""

import json
import os
import signal
import sys
import threading


def say(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def read_line() -> dict:
    line = sys.stdin.readline()
    if not line:
        os._exit(3)
    return json.loads(line)


def main() -> None:
    bootstrap = read_line()
    say(event="pid", pid=os.getpid())
    for word in bootstrap["script"]:
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "traceback":
            raise RuntimeError("the disk caught fire")
        elif word == "error":
            say(event="error", message="bad learning rate", exit_code=2)
            sys.exit(2)
        elif word == "lost":
            say(event="error", message="rank 1 is gone", exit_code=3, consequence=True, lost=1)
            sys.exit(3)
        elif word == "command":  # wait for a command, say it, and do what a rank does
            command = read_line()
            say(event="command", command=command)
            if command["command"] == "stop":
                sys.exit(130)
            if command["command"] == "abort":
                say(event="error", message="told to end", exit_code=3, consequence=True)
                sys.exit(3)
        elif word == "hang":  # deaf to everything but SIGKILL
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            threading.Event().wait()
        elif word == "lifeline":
            read_line()
        else:
            say(event="word", word=word)


main()
