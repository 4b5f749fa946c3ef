"""Resources of the host, checked before an engine starts: descriptors and room for files."""

import os
import resource

from tpllm.errors import SettingError

# Open files of a worker: libraries, sockets of the group, and the device files of up to eight GPUs.
WORKER_DESCRIPTORS = 256
MAX_OPEN_FILES = 65536  # of a server, or of a client that loads one
# The workers meet through a file and some sockets in the temporary directory: kilobytes.
MIN_ROOM_BYTES = 1 << 20
# NCCL keeps a segment of about 10 MB in /dev/shm for each rank where GPUs share no memory.
SHM_BYTES_PER_RANK = 10 << 20


def refuse_too_few_descriptors(world_size: int) -> None:
    """Check that this process and each worker can open enough descriptors.

    Raises:
        SettingError: the limit is too low.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    # one ring to all ranks; for each rank a ring back, its spec, its stacks and its pidfd
    needed = 16 + 8 * world_size
    used = len(os.listdir("/proc/self/fd"))
    if used + needed > limit or limit < WORKER_DESCRIPTORS:
        raise SettingError(
            f"the limit of {limit} open files is too low: this process has {used} open and needs "
            f"{needed} more for tensor_parallel_size={world_size}, and each worker up to "
            f"{WORKER_DESCRIPTORS}; raise it, as with ulimit -n 4096"
        )


def allow_many_connections() -> None:
    """Raise the soft limit of file descriptors, usually 1,024: each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def refuse_too_little_room(folder: str) -> None:
    """Check that the temporary directory has room for the workers' files.

    Raises:
        SettingError: it is full, or read-only.
    """
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    full = free < MIN_ROOM_BYTES or (found.f_files and not found.f_favail)
    if full or found.f_flag & os.ST_RDONLY:
        raise SettingError(
            f"TMPDIR={folder!r} has {free >> 10} KiB and {found.f_favail} files to spare, and the "
            f"workers need {MIN_ROOM_BYTES >> 10} KiB there to meet; make room, or set TMPDIR"
        )


def refuse_too_little_shared_memory(num_gpus: int, folder: str = "/dev/shm") -> None:  # noqa: S108
    """Check that NCCL can exchange data between the GPUs through the host.

    Raises:
        SettingError: `folder`, which NCCL uses for it, is too small.
    """
    if num_gpus < 2 or os.environ.get("NCCL_SHM_DISABLE") == "1" or not os.path.isdir(folder):
        return
    found = os.statvfs(folder)
    free, needed = found.f_bavail * found.f_frsize, num_gpus * SHM_BYTES_PER_RANK
    if free < needed:
        raise SettingError(
            f"{folder} has {free >> 20} MiB free, and NCCL may need {needed >> 20} MiB there for "
            f"tensor_parallel_size={num_gpus}; give the container more (docker run --shm-size=1g), "
            "or set NCCL_SHM_DISABLE=1 where the GPUs reach each other directly"
        )
