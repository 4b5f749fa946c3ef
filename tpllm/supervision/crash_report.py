"""Writes a readable file about a failed engine: versions, GPUs, settings, last steps, stacks.

The report holds no prompts and no outputs. Stacks name only files, lines and functions, and the
environment section holds only variables that configure GPUs and their communication. It includes a
worker's traceback, as the exception does.
"""

import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpllm import __version__
from tpllm.config.devices import installed, visible_gpus
from tpllm.supervision.diagnosis import RankState

FOLDER_VARIABLE = "TPLLM_CRASH_DIR"
NUM_KEPT = 20
_PACKAGES = ("torch", "triton", "flash-attn", "transformers", "numpy")
_REPORTED_VARIABLES = ("CUDA_", "GLOO_", "NCCL_", "TORCH_NCCL_", "OMP_NUM_THREADS", "TMPDIR")


def report_folder() -> Path | None:
    """Return the folder of reports: TPLLM_CRASH_DIR, or tpllm/crashes in the user's state folder.

    Return None if TPLLM_CRASH_DIR is set and empty: then no reports are written.
    """
    wanted = os.environ.get(FOLDER_VARIABLE)
    if wanted is not None:
        return Path(wanted) if wanted else None
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "tpllm" / "crashes"


def write_report(
    message: str,
    settings: Mapping[str, Any],
    steps: Sequence[str],
    ranks: Sequence[RankState],
) -> Path | None:
    """Write a report, delete the oldest ones beyond NUM_KEPT, and return the report's path.

    Return None if reports are switched off or the folder is not writable.
    """
    folder = report_folder()
    if folder is None:
        return None
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(4)}.txt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="utf-8", errors="replace") as file:
            file.write(_text(message, settings, steps, ranks))
        for report in sorted(folder.glob("crash-*.txt"))[:-NUM_KEPT]:  # names begin with the time
            report.unlink(missing_ok=True)
    except OSError:
        return None
    return folder / name


def _text(
    message: str, settings: Mapping[str, Any], steps: Sequence[str], ranks: Sequence[RankState]
) -> str:
    sections = {
        "What happened": message,
        "Last steps": "\n".join(steps) or "none was sent",
        "Ranks": "\n\n".join(_rank_text(each) for each in ranks),
        "Versions": _versions(),
        "GPUs": "\n".join(_gpus()) or "none visible",
        "Settings": _settings_text(settings),
        "Environment": "\n".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_REPORTED_VARIABLES)
        ),
    }
    head = f"tpllm crash report, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
    return head + "".join(f"\n== {title}\n{body}\n" for title, body in sections.items())


def _rank_text(rank: RankState) -> str:
    stacks = rank.stacks or "(no stack)"
    steps = f"begun {rank.begun}, launched {rank.launched}"
    return f"rank {rank.rank}, pid {rank.pid}: {rank.phase}; {rank.state}; {steps}\n{stacks}"


def _versions() -> str:
    lines = [f"tpllm {__version__}", f"python {sys.version.split()[0]}", platform.platform()]
    lines += [f"{name} {found}" for name in _PACKAGES if (found := installed(name))]
    return "\n".join(lines)


def _gpus() -> list[str]:
    return [
        f"{i}: {gpu.name}, {gpu.uuid}" + (f", {gpu.memory_text()}" if gpu.total_bytes else "")
        for i, gpu in enumerate(visible_gpus())
    ]


def _settings_text(settings: Mapping[str, Any]) -> str:
    config = settings.get("config")  # JSON inside the settings, as the workers receive it
    return json.dumps(json.loads(config) if isinstance(config, str) else settings, indent=1)
