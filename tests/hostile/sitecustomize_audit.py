"""Becomes sitecustomize.py of the processes of a real run: says in a file of its own what happens in this process.

One JSON line each: "start" (arguments and environment), "pickle" (an unpickler looks something up, and where), "child"
(a process is started: its arguments and environment), "drawn" (32 random bytes that may become a token).
"""

import collections
import json
import os
import pickle
import secrets
import sys
import traceback

_file = os.open(
    os.path.join(os.environ["HOSTILE_AUDIT"], f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
)


def _write(kind, **fields):
    os.write(_file, (json.dumps({"kind": kind, **fields}) + "\n").encode())


def _text(value):
    return os.fsdecode(value) if isinstance(value, str | bytes) else str(value)


def _hear(event, arguments):
    if event == "pickle.find_class":
        where = "".join(traceback.format_stack(limit=12)[:-1])
        _write("pickle", what=".".join(map(str, arguments)), where=where)
    elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
        program, words, environment = arguments[0], arguments[1], arguments[-1]
        environment = os.environ if environment is None else environment
        _write(
            "child",
            arguments=[_text(program), *map(_text, words)],
            environment={_text(name): _text(value) for name, value in dict(environment).items()},
        )


sys.addaudithook(_hear)
_write("start", arguments=sys.orig_argv, environment=dict(os.environ))

_draw = secrets.token_bytes


def _noted(nbytes=None):
    drawn = _draw(nbytes)
    _write("drawn", value=drawn.hex())
    return drawn


secrets.token_bytes = _noted

pickle.loads(pickle.dumps(collections.OrderedDict()))  # proves that the hook hears it
