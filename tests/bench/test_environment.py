"""What is told of the machine."""

from __future__ import annotations

import json
import os
import socket
import time

from deploytool.bench.environment import between, environment, usage


def test_environment_is_data_without_identity() -> None:
    """The environment is plain JSON, names the processor and packages, and neither host, user nor folder."""
    found = environment()
    text = json.dumps(found, allow_nan=False)
    assert found["cores_usable"] >= 1 and found["memory_bytes"] > 0 and found["packages"]["numpy"]
    assert not {"host", "hostname", "node", "user"} & found.keys()
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert os.path.expanduser("~") == "/" or os.path.expanduser("~") not in text


def test_own_work_is_not_foreign() -> None:
    """CPU time of this process is taken off what others used; nothing is negative."""
    start = usage([])
    end_of_work = time.process_time() + 0.3
    while time.process_time() < end_of_work:
        pass
    end = usage([])
    assert end.own - start.own >= 0.3
    assert min(between(start, end).values()) >= 0
    assert between(start, start) == {"foreign_load_cores": 0.0, "steal_cores": 0.0}
