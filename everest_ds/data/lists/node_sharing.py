"""Sharing a long list between the ranks of a machine: the first rank reads it, the others map its memory.

The memory has no name in any file system. Its descriptor is sent through a socket with an abstract name, made from
the launch and the list, so a rank that dies leaves nothing behind. A rank that receives nothing reads the list
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

# Reading shorter lists is faster than asking for them.
_LEAST_BYTES = 16 << 20
_WAIT_S, _READING_S, _GLANCE_S = 30.0, 600.0, 0.05


def read_on_node(files: list[Path], read: Callable[[], PackedRows], world: World) -> PackedRows:
    """Return the rows of ``read``, which one rank of each machine calls; if sharing fails, every rank calls it.

    Args:
        files: Files that ``read`` reads, the list first; the same on all ranks.
        read: Reads the rows.
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
        except OSError:  # a rank did not ask in time: it reads the list itself
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
    """Return whether the process at the other end belongs to the same user."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.getuid())
