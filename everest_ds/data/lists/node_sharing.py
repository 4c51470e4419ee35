"""One reading of a long list for all ranks of a machine: the first one reads, the others map its memory.

The rows' memory has no name in any file system. Its descriptor goes through a socket with an abstract name, made of
the launch and the list, so that nothing is left behind by a rank that dies. A rank that gets nothing reads the list
itself.
"""

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from everest_ds.data.lists.packed_rows import PackedRows
from everest_ds.distributed import World

# Shorter lists are read sooner than asked for.
_LEAST_BYTES = 16 << 20
_WAIT_S, _READING_S, _GLANCE_S = 30.0, 600.0, 0.05


def read_on_node(files: list[Path], read: Callable[[], PackedRows], world: World) -> PackedRows:
    """Return what ``read`` returns: called by one rank of a machine, or by each where that fails.

    Args:
        files: What is read: the list first. They have to be the same for all ranks.
        read: Reads.
        world: This rank's place on its machine.
    """
    known = [_identity(file) for file in files]
    if world.local_size == 1 or None in known or files[0].stat().st_size < _LEAST_BYTES:
        return read()
    launch = [os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("TORCHELASTIC_RESTART_COUNT")]
    name = hashlib.sha256(json.dumps([launch, *known]).encode()).hexdigest()[:24]
    address = f"\0everest-rows-{name}"
    if world.local_rank == 0:
        return _read_for_all(address, read, world.local_size - 1)
    return _receive(address) or read()


def _identity(file: Path) -> list[object] | None:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return [os.path.abspath(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _read_for_all(address: str, read: Callable[[], PackedRows], num_others: int) -> PackedRows:
    door = socket.socket(socket.AF_UNIX)
    try:
        door.bind(address)
        door.listen(num_others)
        rows = read()
    except OSError:  # the name is taken
        door.close()
        return read()
    except BaseException:
        door.close()
        raise
    threading.Thread(target=_hand_out, args=(door, rows, num_others), daemon=True).start()
    return rows


def _hand_out(door: socket.socket, rows: PackedRows, num_others: int) -> None:
    file, folder, shape = rows.memory
    message = json.dumps([folder, *shape]).encode()
    door.settimeout(_WAIT_S)
    with door:
        try:
            for _ in range(num_others):
                with door.accept()[0] as other:
                    if _is_ours(other):
                        socket.send_fds(other, [message], [file])
        except OSError:  # nobody came in time: they read it themselves
            return


def _receive(address: str) -> PackedRows | None:
    until = time.monotonic() + _WAIT_S
    with socket.socket(socket.AF_UNIX) as door:
        while True:
            try:
                door.connect(address)
                break
            except OSError:
                if time.monotonic() > until:
                    return None
                time.sleep(_GLANCE_S)
        door.settimeout(_READING_S)
        try:
            message, files, _, _ = socket.recv_fds(door, 1 << 16, 1) if _is_ours(door) else (b"", [], 0, "")
        except OSError:
            return None
    if not message or not files:
        return None
    folder, *shape = json.loads(message)
    return PackedRows.of_memory(files[0], folder, *shape)


def _is_ours(other: socket.socket) -> bool:
    """Say whether a process of the same user is at the other end."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.getuid())
