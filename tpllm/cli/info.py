"""`tpllm info`: the hardware and packages of this machine, and what an engine would use."""

import json
import os
import platform
import sys
from argparse import Namespace
from typing import Any

import tpllm
from tpllm.cli.choices import explain
from tpllm.cli.command import Commands, add_command, add_engine_flags, engine_settings
from tpllm.cli.hardware import Hardware, Link
from tpllm.config.devices import installed

VERSIONS = ("torch", "triton", "transformers", "tokenizers", "numpy")
# The use of a backend, and the packages that it needs.
BACKENDS = {
    "flash-attn": ("prefill on GPUs", ("flash-attn",)),
    "triton": ("kernels on GPUs", ("triton",)),
    "server": ("tpllm serve", ("fastapi", "uvicorn")),
}


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "info",
        run,
        "show GPUs, links, versions, and what would be chosen for a model",
        "tpllm info Qwen/Qwen3-8B --tensor-parallel-size 2",
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    add_engine_flags(parser, starts=False)


def run(args: Namespace) -> int:
    """Show everything; a model that cannot run here is an error at the end."""
    given = engine_settings(args)
    hardware = Hardware.look()
    facts: dict[str, Any] = {
        "tpllm": tpllm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: installed(name) for name in VERSIONS},
        "backends": {
            name: {package: installed(package) for package in packages}
            for name, (_, packages) in BACKENDS.items()
        },
        "hardware": hardware.as_json(),
    }
    error: Exception | None = None
    try:
        with given.named_in_errors():
            choices = explain(given, hardware)
            facts["choices"] = {k: {"choice": c, "why": w} for k, (c, w) in choices.items()}
    except (ValueError, OSError) as caught:
        error = caught
        facts["choices"] = None
    if args.json:
        print(json.dumps(facts))
    else:
        _show(facts, hardware)
    if error is not None:
        sys.stdout.flush()
        raise error
    return 0


def _show(facts: dict[str, Any], hardware: Hardware) -> None:
    print(f"tpllm {facts['tpllm']}, Python {facts['python']}, {facts['system']}", end="")
    print(f", {facts['cpus']} CPU cores")
    print(", ".join(f"{name} {found or 'missing'}" for name, found in facts["versions"].items()))
    print("\nBackends")
    for name, packages in facts["backends"].items():
        found = ", ".join(f"{p} {v}" if v else f"{p} is missing" for p, v in packages.items())
        print(f"  {name:<20}{found} ({BACKENDS[name][0]})")
    print(f"\nGPUs{f', driver {hardware.driver}' if hardware.driver else ''}")
    for rank, gpu in enumerate(hardware.gpus):
        nvlinks = hardware.num_nvlinks[rank]
        print(f"  {rank:<3}{gpu.name}, capability {gpu.capability}, {gpu.memory_text()}", end="")
        print(f", {nvlinks} NVLinks" if nvlinks else "")
    if hardware.why_no_gpu:
        print(f"  none: {hardware.why_no_gpu}")
    for link in hardware.links:
        print(f"  {link.ranks[0]} - {link.ranks[1]}: {_link_line(link)}")
    if facts["choices"] is not None:
        print("\nAn engine with these settings would use")
        for name, chosen in facts["choices"].items():
            print(f"  {name:<20}{chosen['choice']} ({chosen['why']})")


def _link_line(link: Link) -> str:
    over = {True: "NVLink", False: "no NVLink", None: "NVLink unknown"}[link.nvlink]
    reach = {True: "peer access", False: "no peer access", None: "peer access unknown"}
    return f"{over}, {reach[link.peer_access]}"
